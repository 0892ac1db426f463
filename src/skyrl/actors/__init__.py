"""Thin Ray shells round the plain classes, their placement, and the pools that the controller talks to."""
