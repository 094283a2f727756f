"""CuTe DSL GEMMs for Hopper and Blackwell: what they may be, how they are compiled ahead of time, kept, loaded and launched.

    config.py    the parameters, and which of them go together
    spec.py      what decides the machine code of one kernel, and the record that travels with its shared object
    operators.py, quack.py   two sources: nvidia-cutlass-operators and quack-kernels (the only imports of either)
    blackwell.py all operators for SM100, by name: compiled by tests, in no space
    own.py       the third, for few rows: cluster_gemm.py (clusters share a tile's K)
    compiler.py  one kernel, in this process, to a shared object
    preload.py   both sources imported in half the time, for processes that only compile
    cache.py     shared objects on disk, under their specs' keys
    call.py      the Python function that calls one kernel, written out for its launch
    objects.py   loading: all that production needs, and the only import of tvm_ffi
    op.py        torch.ops.autokernel.cute_gemm

Kernels are compiled for any size: dtypes, majors, config and epilogue decide a shared object, rows and columns do not.
"""
