"""Recipes: typed sections with a description for each key, YAML with `base:`, overrides, origins, rules between keys."""
