"""Recipes: what a run shall do, in YAML.

schema       every key with its type, default and description
load         read files and overrides, merge the layers, report everything that is wrong at once
rules        combinations of keys that would fail late, or do something else than asked
yaml_subset  the part of YAML that recipes are written in, read and written
flags        command-line options, and what to write for those of other trainers
synonyms     names that other trainers give to our keys
dump         a resolved recipe as YAML, on request with the origin of each value
"""
