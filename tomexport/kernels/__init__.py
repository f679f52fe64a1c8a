"""The operators of token reduction, each as the same arithmetic in several forms.

One folder an operator: `reference.py` (torch, defines the truth), `function.py` (standard ONNX)
and `cases.py` (inputs for tests and benchmarks). `operators.py` lists them.
"""
