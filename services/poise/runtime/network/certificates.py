"""The TLS certificate of a service. It is read again when its files change, as in a Kubernetes secret."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

import grpc

logger = logging.getLogger(__name__)


class Certificate:
    """A certificate chain and its key. New connections use the current files; open ones keep their certificate."""

    def __init__(self, cert_file: Path, key_file: Path) -> None:
        self._files = (cert_file, key_file)
        self._seen: tuple[int, ...] = ()
        self._last: grpc.ServerCertificateConfiguration

    def credentials(self) -> grpc.ServerCredentials:
        """Return server credentials that follow the files.

        Raises:
            OSError: a file cannot be read, or the key does not belong to the certificate.
            ValueError: the key is encrypted.
        """
        return grpc.dynamic_ssl_server_credentials(self._read(), self._current)

    def _read(self) -> grpc.ServerCertificateConfiguration:
        self._seen = self._times()
        # gRPC would accept any content, and then fail every handshake.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(*self._files, _no_password)
        chain, key = (path.read_bytes() for path in self._files)
        self._last = grpc.ssl_server_certificate_configuration([(key, chain)])
        return self._last

    def _current(self) -> grpc.ServerCertificateConfiguration:
        """Return the current certificate. gRPC calls this at every handshake, on its own thread."""
        try:
            if self._times() != self._seen:
                self._read()
                logger.info("the certificate changed; new connections use it")
        except (OSError, ValueError) as error:
            logger.error("the new certificate cannot be used, the previous one stays: %s", error)
        return self._last

    def _times(self) -> tuple[int, ...]:
        return tuple(path.stat().st_mtime_ns for path in self._files)


def _no_password() -> str:
    raise ValueError("the key is encrypted. gRPC needs it without a password")
