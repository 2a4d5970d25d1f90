"""The inference engines, one package each. They implement `generation.engine.Engine`."""
