"""Packaging: the top-level folders convert, tools, configs and examples are installed inside the mindvlm package.

The C++ kernels are compiled if there is a compiler; otherwise `mindvlm.native.library` tries again at first use.
"""

import importlib.util
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

# a package that is not installed yet cannot be imported
spec = importlib.util.spec_from_file_location(
    "kernel_build", Path(__file__).with_name("mindvlm") / "native" / "build.py"
)
kernel_build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel_build)


class BuildKernels(build_ext):
    """Compiles the kernels to a shared library, which is no Python module."""

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            kernel_build.build(target)
        except (kernel_build.CompilerError, OSError) as error:
            self.warn(f"kernels are not compiled: {error}")

    def get_ext_filename(self, fullname):
        return f"{fullname.replace('.', '/')}.so"

    def copy_extensions_to_source(self):
        if Path(self.build_lib, self.get_ext_filename(self.extensions[0].name)).exists():
            super().copy_extensions_to_source()


library = find_packages(include=["mindvlm", "mindvlm.*"])
mapped = {
    "mindvlm.convert": "convert",
    "mindvlm.tools": "tools",
    "mindvlm.configs": "configs",
    "mindvlm.examples": "examples",
}
for folder in ("convert", "tools"):
    mapped |= {f"mindvlm.{folder}.{name}": f"{folder}/{name.replace('.', '/')}" for name in find_packages(folder)}

setup(
    packages=library + list(mapped),
    ext_modules=[Extension("mindvlm.native.libkernels", sources=[], optional=True)],
    cmdclass={"build_ext": BuildKernels},
    package_dir={"mindvlm": "mindvlm", **mapped},
    package_data={
        "mindvlm.native": ["src/*"],
        "mindvlm.serving.page": ["index.html", "page.css", "page.js"],
        "mindvlm.configs": ["*/*.yaml"],
        "mindvlm.examples": ["*", "*/*"],
    },
)
