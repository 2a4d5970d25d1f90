from __future__ import annotations

import pytest

from poise.learner.app import build
from poise.runtime.config.settings import ConfigError


@pytest.mark.parametrize("target", ["http://gen:50051", "gen", "dns:gen:1"])
def test_replica_that_is_not_an_address_is_rejected(config, target):
    with pytest.raises(ValueError, match=r"replicas[\s\S]*must look like"):
        config(replicas=("gen:50051", target))


def test_unreadable_ca_file_is_rejected_at_the_start(config, tmp_path):
    with pytest.raises(ConfigError, match=r"replica_ca_file: .*ca\.pem cannot be read"):
        build(config(replicas=("gen:50051",), replica_ca_file=tmp_path / "ca.pem"))
    (tmp_path / "ca.pem").write_text("")
    build(config(replicas=("gen:50051",), replica_ca_file=tmp_path / "ca.pem"))
