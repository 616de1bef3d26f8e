"""Bridge that nnU-Net's trainer lookup imports: hands out the trainers of the installed package by name.

nnU-Net drops modules found in this folder after each search, so no class may be defined here: names are resolved
lazily from ``nnunet_dgplugins``, where classes keep their identity and can be pickled.
"""


def __getattr__(name):
    try:
        from nnunet_dgplugins.registry import TRAINERS, load_trainer
    except ModuleNotFoundError as error:
        # the variable is inherited by child processes of another interpreter, which may not have our package
        if error.name and error.name.split(".")[0] == "nnunet_dgplugins":
            raise AttributeError(name) from None
        raise
    if name not in TRAINERS:
        raise AttributeError(name)
    return load_trainer(name)
