"""Packaging: the top-level folders convert, tools, configs and examples are installed inside the mindvlm package."""

from setuptools import find_packages, setup

library = find_packages(include=["mindvlm", "mindvlm.*"])
mapped = {
    "mindvlm.convert": "convert",
    **{f"mindvlm.convert.{name}": f"convert/{name}" for name in ("parity", "reference", "report")},
    "mindvlm.tools": "tools",
    "mindvlm.configs": "configs",
    "mindvlm.examples": "examples",
}

setup(
    packages=library + list(mapped),
    package_dir={"mindvlm": "mindvlm", **mapped},
    package_data={
        "mindvlm.configs": ["*/*.yaml"],
        "mindvlm.examples": ["*", "*/*"],
    },
)
