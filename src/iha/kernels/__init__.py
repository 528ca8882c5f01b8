"""Triton kernels that never write a pseudo tensor: base tensors in, outputs out.

layout.py     what a kernel is compiled for (`Spec`) and the tensors that it is handed
tiles.py      what every kernel does with one tile: mix, rotate, score, collapse
visibility.py who sees whom
forward.py    outputs                    backward.py   gradients, by recomputation
decode.py     a few queries against a long cache
configs.py    tile sizes                 launch.py     grids and arguments
ops.py        the kernels as operators of `torch.library`, with fake tensors and autograd

Only `iha.backends.fused` imports this package, and only when it runs: `import iha` needs no Triton.
"""
