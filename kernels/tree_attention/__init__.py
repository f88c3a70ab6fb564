"""Attention in which a token sees its ancestors in the tree, over packed streams."""
