"""Packaging: the top-level folders convert, tools, configs and examples are installed inside the mindvlm package."""

from setuptools import find_packages, setup

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
    package_dir={"mindvlm": "mindvlm", **mapped},
    package_data={
        "mindvlm.configs": ["*/*.yaml"],
        "mindvlm.examples": ["*", "*/*"],
    },
)
