"""The closed middle: a few nodes, what they mean, and the laws between them. It knows no transform."""
