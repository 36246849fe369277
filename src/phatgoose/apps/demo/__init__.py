"""The demo: trains five experts on tasks of our own text, routes them, and scores them."""
