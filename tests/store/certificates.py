# SPDX-License-Identifier: Apache-2.0
"""A certificate authority for one test."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

BEGINS = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
ENDS = datetime.datetime(2120, 1, 1, tzinfo=datetime.UTC)


class Certificate(NamedTuple):
    cert_file: Path
    key_file: Path


class Authority:
    """Its own certificate is in `file`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _named("authority of a test")
        self.file = directory / "authority.pem"
        basic = x509.BasicConstraints(ca=True, path_length=0)
        self.file.write_bytes(self._signed(self._name, self._key, basic, "authority"))

    def certificate(self, name: str) -> Certificate:
        """For a host with this address, or a client of this name."""
        key = ec.generate_private_key(ec.SECP256R1())
        files = Certificate(self._directory / f"{name}.pem", self._directory / f"{name}.key")
        basic = x509.BasicConstraints(ca=False, path_length=None)
        files.cert_file.write_bytes(self._signed(_named(name), key, basic, name))
        pem, pkcs8, plain = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        files.key_file.write_bytes(key.private_bytes(pem, pkcs8, plain))
        return files

    def server_settings(self, host: str) -> list[str]:
        """For a server that speaks only TLS and wants certificates of this authority."""
        files = self.certificate(host)
        tls = ["--tls-cert-file", str(files.cert_file), "--tls-key-file", str(files.key_file)]
        return [*tls, "--tls-ca-cert-file", str(self.file)]

    def _signed(
        self, name: x509.Name, key: ec.EllipticCurvePrivateKey, basic: x509.BasicConstraints, host: str
    ) -> bytes:
        try:
            known_as: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
        except ValueError:
            known_as = x509.DNSName(host.replace(" ", "-"))
        builder = x509.CertificateBuilder(self._name, name, key.public_key(), x509.random_serial_number(), BEGINS, ENDS)
        usage = {"digital_signature": True, "key_cert_sign": basic.ca, "crl_sign": basic.ca}
        others = "content_commitment key_encipherment data_encipherment key_agreement encipher_only decipher_only"
        for extension, critical in (
            (basic, True),
            (x509.SubjectAlternativeName([known_as]), False),
            (x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False),
            (x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), False),
            (x509.KeyUsage(**usage, **dict.fromkeys(others.split(), False)), True),
        ):
            builder = builder.add_extension(extension, critical)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
