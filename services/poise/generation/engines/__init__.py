"""The engines that sample: one package each, behind the protocol in `generation.engine`."""
