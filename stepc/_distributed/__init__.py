"""Several processes that train as one: how they find each other, agree, and learn that one is gone. Knows no step."""
