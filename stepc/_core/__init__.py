"""The closed core: a few nodes and the laws between them. It knows no transform."""
