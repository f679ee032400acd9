"""Bodies without a socket; test_app.py sends the others."""

import base64

import pytest

from tdjax.errors import UsageError
from tdjax.server.body import _inline_image


def test_images_in_json_are_data_and_no_addresses():
    data = "data:image/png;base64," + base64.b64encode(b"abc").decode()
    assert _inline_image({"image_url": data}) == _inline_image(data) == b"abc"
    assert _inline_image(None) is None
    for strange in (
        "http://169.254.169.254/",
        "file:///etc/passwd",
        "/etc/passwd",
        {"image_url": "https://example.org/x.png"},
        {"image_url": data, "file_id": "x"},
        {"file_id": "x"},
        "data:text/html;base64,YQ==",
        "data:image/png;base64,***",
        "data:image/png;base64,é",
        "data:image/png,abc",
        3,
        [data],
    ):
        with pytest.raises(UsageError):
            _inline_image(strange)
