"""The public surface."""

import ast
import inspect

import specvlm


def test_all_names_exist_and_nothing_else_is_public():
    tree = ast.parse(inspect.getsource(specvlm))
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("specvlm")
        for alias in node.names
    }
    assert imported == set(specvlm.__all__)
    assert list(specvlm.__all__) == sorted(specvlm.__all__)
    for name in specvlm.__all__:
        assert getattr(specvlm, name).__module__.startswith("specvlm."), name
