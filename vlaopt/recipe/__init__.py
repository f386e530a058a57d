"""Recipes: what to build, for which target, within which limits.

`reader` turns strict YAML into plain values, `model` says what a recipe may hold, `checks` finds impossible
combinations, `load` puts them together and reports every problem at once, `schema` describes it all to an editor.
Nothing here knows how a stage works.
"""
