"""Finds the C++ compiler of this machine, for compiled sub-blocks and for compiled kernels."""


def cpp_compiler() -> str | None:
    """Returns the compiler that PyTorch's Inductor uses: that of CXX, else g++ (clang++ on macOS).

    None: it is not installed.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return get_cpp_compiler()
    except InvalidCxxCompiler:
        return None
