"""What is read once."""

from __future__ import annotations

import ssl
from pathlib import Path

import httpx
import pytest

from post_training.certificates import certificates


def test_the_certificates_are_read_once_and_are_those_of_httpx(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usual = httpx.create_ssl_context()
    trusted = certificates()
    assert trusted.verify_mode == ssl.CERT_REQUIRED
    assert trusted.check_hostname
    assert trusted.cert_store_stats() == usual.cert_store_stats()
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "missing.pem"))  # who reads again now fails
    assert certificates() is trusted
