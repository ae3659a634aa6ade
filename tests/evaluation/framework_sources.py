"""Modules of evaluation frameworks, loaded by path from the packages of PyPI without importing the frameworks."""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

from tests.evaluation.framework_environments import source


class Anything:
    """A value that modules use when they are imported: it has every attribute, can be called, and decorates."""

    def __getattr__(self, name: str) -> "Anything":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *arguments, **options):
        return arguments[0] if len(arguments) == 1 and callable(arguments[0]) else self


class StandIn(ModuleType):
    """A module in place of one that is not installed, or of a part of a framework."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__path__, self.__all__ = [], []

    def __getattr__(self, name: str) -> Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()


class Finder:
    """Finds a stand-in for every module that nothing else finds."""

    def find_spec(self, name, path=None, target=None) -> ModuleSpec:
        return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> StandIn:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


LOADED: dict[str, ModuleType] = {}


def load(name: str, **values) -> ModuleType:
    """Returns a module of a framework, such as "lmms_eval.tasks.pope.utils".

    Modules of the framework that it imports are stand-ins, except those that this function has loaded before.

    Args:
        values: set in the module, for names that it takes from a stand-in.
    """
    framework, *rest = name.split(".")
    spec = importlib.util.spec_from_file_location(name, source(framework).joinpath(*rest).with_suffix(".py"))
    module = importlib.util.module_from_spec(spec)
    before, finder = dict(sys.modules), Finder()
    # an installed framework is not imported
    sys.modules[framework] = StandIn(framework)
    sys.modules.update(LOADED)
    sys.meta_path.append(finder)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.meta_path.remove(finder)
        for other in [key for key in sys.modules if key.split(".")[0] == framework]:
            del sys.modules[other]
        for other in [key for key, value in sys.modules.items() if isinstance(value, StandIn)]:
            del sys.modules[other]
        sys.modules.update(before)
    vars(module).update(values)
    LOADED[name] = module
    return module
