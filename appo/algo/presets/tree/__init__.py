"""Algorithms over trees: roots are drawn whole, branches fork from positions of them."""
