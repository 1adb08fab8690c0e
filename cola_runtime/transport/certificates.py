"""The service's own certificate authority: what devices and the base model prove themselves with.

Keys are P-256. A device is its key: a certificate names the device in its subject, and the registry knows the
digest of the key it was issued for. The only home of `cryptography`.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cola_runtime.errors import InvalidInput, Unauthenticated

AUTHORITY_DAYS = 3650
SERVER_DAYS = 365
CLOCK_SKEW = timedelta(minutes=5)
MAX_REQUEST_BYTES = 8192

_CURVE = ec.SECP256R1


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A certificate with its key, and the authority that its peers' certificates must come from."""

    certificate_pem: bytes
    key_pem: bytes = field(repr=False)
    authority_pem: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerCertificate:
    """What TLS has verified of a peer."""

    name: str  # of a device: its id
    key_sha256: str
    expires_at: datetime


class Authority:
    """Issues certificates. `create` makes one, `open` keeps it in a folder of its own."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self._certificate, self._key = certificate, key

    @property
    def certificate_pem(self) -> bytes:
        return self._certificate.public_bytes(Encoding.PEM)

    @classmethod
    def create(cls) -> Authority:
        key = ec.generate_private_key(_CURVE())
        name = _name("cola service authority")
        builder = _builder(name, key.public_key(), timedelta(days=AUTHORITY_DAYS)).issuer_name(name)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        usage = _usage(signs_certificates=True)
        return cls(builder.add_extension(usage, critical=True).sign(key, hashes.SHA256()), key)

    @classmethod
    def open(cls, folder: Path) -> Authority:
        """The authority in the folder; made at first use, its key readable by its owner only."""
        certificate_file, key_file = folder / "authority.pem", folder / "authority.key"
        if not certificate_file.exists():
            made = cls.create()
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_private(key_file, _key_pem(made._key))
            certificate_file.write_bytes(made.certificate_pem)
        key = load_pem_private_key(key_file.read_bytes(), password=None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return cls(x509.load_pem_x509_certificate(certificate_file.read_bytes()), key)

    def server(self, hosts: Sequence[str], *, lifetime: timedelta = timedelta(days=SERVER_DAYS)) -> Identity:
        """For whoever listens at these host names or addresses."""
        key = ec.generate_private_key(_CURVE())
        builder = _builder(_name(hosts[0]), key.public_key(), lifetime)
        names = x509.SubjectAlternativeName([_host(host) for host in hosts])
        certificate = self._sign(
            builder.add_extension(names, critical=False), ExtendedKeyUsageOID.SERVER_AUTH
        )
        return Identity(
            certificate_pem=certificate, key_pem=_key_pem(key), authority_pem=self.certificate_pem
        )

    def device(self, device_id: str, request_pem: bytes, *, lifetime: timedelta) -> bytes:
        """A certificate for the key of `request_pem`, whatever else the request says.

        Raises InvalidInput `CERTIFICATE_REQUEST_INVALID`.
        """
        key = _requested_key(request_pem)
        return self._sign(_builder(_name(device_id), key, lifetime), ExtendedKeyUsageOID.CLIENT_AUTH)

    def _sign(self, builder: x509.CertificateBuilder, purpose: x509.ObjectIdentifier) -> bytes:
        builder = builder.issuer_name(self._certificate.subject)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM)


def new_key() -> bytes:
    """A private key, PEM."""
    return _key_pem(ec.generate_private_key(_CURVE()))


def certificate_request(key_pem: bytes) -> bytes:
    """Proves to hold the key; says nothing else."""
    key = load_pem_private_key(key_pem, password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


def requested_key_sha256(request_pem: bytes) -> str:
    """The digest that the registry knows the key by. Raises InvalidInput `CERTIFICATE_REQUEST_INVALID`."""
    return _key_sha256(_requested_key(request_pem))


def read_certificate(pem: bytes) -> PeerCertificate:
    """Raises Unauthenticated `CERTIFICATE_INVALID` for what is none of ours."""
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        (common_name,) = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        key = certificate.public_key()
    except ValueError as error:
        raise Unauthenticated("CERTIFICATE_INVALID", "the peer's certificate cannot be read") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise Unauthenticated("CERTIFICATE_INVALID", "the peer's certificate is not this service's")
    return PeerCertificate(
        name=str(common_name.value),
        key_sha256=_key_sha256(key),
        expires_at=certificate.not_valid_after_utc,
    )


def write_private(file: Path, content: bytes) -> None:
    """A file that only its owner can read, from its first byte on."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)


def _requested_key(request_pem: bytes) -> ec.EllipticCurvePublicKey:
    problem = "it is no signed PKCS #10 request for a P-256 key"
    try:
        if len(request_pem) > MAX_REQUEST_BYTES:
            raise ValueError(problem)
        request = x509.load_pem_x509_csr(request_pem)
        key = request.public_key()
        if not request.is_signature_valid or not isinstance(key, ec.EllipticCurvePublicKey):
            raise ValueError(problem)
        if not isinstance(key.curve, _CURVE):
            raise ValueError(problem)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise InvalidInput(
            "CERTIFICATE_REQUEST_INVALID", f"the certificate request is refused: {problem}"
        ) from error
    return key


def _builder(
    subject: x509.Name, key: ec.EllipticCurvePublicKey, lifetime: timedelta
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(subject).public_key(key)
    builder = builder.serial_number(x509.random_serial_number())
    return builder.not_valid_before(min(now, now + lifetime) - CLOCK_SKEW).not_valid_after(now + lifetime)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        return x509.DNSName(host)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _key_sha256(key: ec.EllipticCurvePublicKey) -> str:
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()
