"""Certificates and keys of a federation: who the SuperLink is, and which nodes may take part."""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

# Flower signs with this curve.
_CURVE = ec.SECP384R1
# Clocks of machines differ.
_BACKDATED = datetime.timedelta(hours=1)


@dataclass(frozen=True)
class Authority:
    """Whom nodes and submitter trust to say who the SuperLink is.

    Its own key exists in this process alone: to renew certificates, prepare new ones for all.
    """

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def made(cls, days: int) -> Authority:
        """Return a new authority, whose certificate ends after so many days."""
        key = ec.generate_private_key(_CURVE())
        usage = x509.KeyUsage(
            key_cert_sign=True,
            crl_sign=True,
            digital_signature=False,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            encipher_only=False,
            decipher_only=False,
        )
        builder = (
            _certificate("fedpriv federation", "fedpriv federation", key.public_key(), days)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        )
        return cls(key, builder.sign(key, hashes.SHA256()))

    def issue(self, hosts: Sequence[str], days: int) -> tuple[bytes, bytes]:
        """Return certificate and key, both PEM, of a server that answers under the names `hosts`.

        Raises:
            ValueError: a host has a character that no certificate holds.
        """
        key = ec.generate_private_key(_CURVE())
        names = x509.SubjectAlternativeName([_name(host) for host in hosts])
        certificate = (
            _certificate(hosts[0], "fedpriv federation", key.public_key(), days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(names, critical=False)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), False
            )
            .sign(self.key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM), _private(key, openssh=False)

    @property
    def pem(self) -> bytes:
        """The authority's certificate: what others need to know of it."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)


def node_keys() -> tuple[bytes, bytes]:
    """Return a node's private key and the public one, as OpenSSH writes them."""
    key = ec.generate_private_key(_CURVE())
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    return _private(key, openssh=True), public + b"\n"


def write_secret(path: Path, secret: bytes) -> None:
    """Write a new file that nobody else can read, from its first moment on."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(secret)


def _certificate(
    subject: str, issuer: str, public: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _private(key: ec.EllipticCurvePrivateKey, openssh: bool) -> bytes:
    form = serialization.PrivateFormat
    return key.private_bytes(
        serialization.Encoding.PEM,
        form.OpenSSH if openssh else form.PKCS8,
        serialization.NoEncryption(),
    )
