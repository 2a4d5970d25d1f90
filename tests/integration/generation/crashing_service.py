"""The generation service with a scripted engine that dies on the prompt "die". Run as a process."""

import sys

from tests.support.scripted_engine import ScriptedEngine

from poise.generation.app import GenerationApp
from poise.generation.config import GenerationConfig
from poise.generation.engine import EngineRequest
from poise.runtime.cli.service_main import service_main


def build(config: GenerationConfig) -> GenerationApp:
    engine = ScriptedEngine()

    async def obey(request: EngineRequest) -> None:
        if bytes(request.prompt_token_ids) == b"die":
            engine.die()

    engine.before_rollout = obey
    return GenerationApp(config, engine)


if __name__ == "__main__":
    sys.exit(service_main("generation", GenerationConfig, build))
