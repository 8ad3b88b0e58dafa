"""``vlp.losses`` exports every public loss."""

import inspect
from importlib import import_module
from pkgutil import iter_modules

import vlp.losses

SHARED = "inputs"  # helpers of the losses


def test_every_public_function_of_the_modules_can_be_imported_from_the_package():
    public = {
        name
        for module in iter_modules(vlp.losses.__path__)
        if module.name != SHARED
        for name, value in vars(import_module(f"vlp.losses.{module.name}")).items()
        if inspect.isfunction(value) and value.__module__ == f"vlp.losses.{module.name}" and not name.startswith("_")
    }
    assert len(public) > 20
    assert public | {"NonFiniteLoss"} == set(vlp.losses.__all__)
    assert all(callable(getattr(vlp.losses, name)) for name in vlp.losses.__all__)
