"Train, mine, evaluate, compare and serve matching and ranking models. Everything here ranks candidates for a query."
__version__ = "0.1.0"

# name -> module: looked up on first use, so that `import proj` stays fast and brings neither torch nor transformers
_public = dict(
    ProjError="core", DataError="core", ConfigError="core", MachineError="core", GateError="core", show_log="core",
    TrainConfig="config", EvaluateConfig="config", Run="run", Store="data.store", load_data="data.sources",
    DualEncoder="models.dual", CrossEncoder="models.cross", Pipeline="pipeline", BM25="models.lexical", Evaluation="evaluate", Report="report", Training="train", fit="train",
)
__all__ = list(_public)


def __getattr__(name):
    if name not in _public: raise AttributeError(f"module 'proj' has no attribute {name!r}")
    from importlib import import_module
    value = globals()[name] = getattr(import_module(f"proj.{_public[name]}"), name)
    return value


def __dir__(): return sorted({*globals(), *_public})
