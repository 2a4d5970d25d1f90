"""The certificate that a service shows: read again when its files change, as those of a Kubernetes secret do."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

import grpc

logger = logging.getLogger(__name__)


class Certificate:
    """A chain and its key. Connections that stand keep what they were opened with; new ones see what the files hold."""

    def __init__(self, cert_file: Path, key_file: Path) -> None:
        self._files = (cert_file, key_file)
        self._seen: tuple[int, ...] = ()
        self._last: grpc.ServerCertificateConfiguration

    def credentials(self) -> grpc.ServerCredentials:
        """Return what a server speaks TLS with, of the files as they are now and will be.

        Raises:
            OSError: a file cannot be read, or they are no pair.
            ValueError: the key is encrypted.
        """
        return grpc.dynamic_ssl_server_credentials(self._read(), self._now)

    def _read(self) -> grpc.ServerCertificateConfiguration:
        self._seen = self._times()
        # gRPC would take anything, and then fail every handshake.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(*self._files, _no_password)
        chain, key = (path.read_bytes() for path in self._files)
        self._last = grpc.ssl_server_certificate_configuration([(key, chain)])
        return self._last

    def _now(self) -> grpc.ServerCertificateConfiguration:
        """Asked at every handshake, on a thread of gRPC's."""
        try:
            if self._times() != self._seen:
                self._read()
                logger.info("the certificate changed, and is shown from now on")
        except (OSError, ValueError) as error:
            logger.error("the new certificate cannot be used, the one before stays: %s", error)
        return self._last

    def _times(self) -> tuple[int, ...]:
        return tuple(path.stat().st_mtime_ns for path in self._files)


def _no_password() -> str:
    raise ValueError("the key is encrypted; gRPC needs it in the clear")
