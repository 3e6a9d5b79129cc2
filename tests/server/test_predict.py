"""`POST /predict`: the contract, over a real engine and a real socket."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from running import Running, running

from models.preprocessing import Preprocessing, load_pixels
from server.settings import Settings

Encode = Callable[..., bytes]
Reference = Callable[..., np.ndarray]

LABELS = ["red", "green", "blue", "cyan", "magenta", "yellow", "black", "white", "orange", "grey"]


def _probabilities(result: dict) -> np.ndarray:
    by_index = {prediction["index"]: prediction["probability"] for prediction in result["predictions"]}
    return np.array([by_index[index] for index in range(len(LABELS))], np.float32)


def test_a_raw_body_is_answered_with_labels_engine_and_latency(
    server: Running, encode: Encode, reference: Reference
) -> None:
    image = encode(1)
    response = server.predict(image, params={"top_k": 10})
    assert response.status_code == 200
    answer = response.json()
    assert answer["request_id"] == response.headers["x-request-id"]
    assert answer["engine"] == {
        "name": "tiny",
        "version": "1",
        "backend": "openvino",
        "precision": "fp32",
        "activation": "softmax",
    }
    (result,) = answer["results"]
    np.testing.assert_array_equal(_probabilities(result), reference(image))
    assert [LABELS[p["index"]] for p in result["predictions"]] == [p["label"] for p in result["predictions"]]
    assert result["filename"] is None
    assert result["batch_size"] == 1
    latency = result["latency_ms"]
    assert latency["decode"] + latency["queue"] + latency["inference"] <= latency["total"] + 0.01
    assert all(value >= 0 for value in latency.values())


def test_predictions_come_best_first_and_five_unless_asked(server: Running, encode: Encode) -> None:
    (result,) = server.predict(encode(2)).json()["results"]
    probabilities = [prediction["probability"] for prediction in result["predictions"]]
    assert len(probabilities) == 5
    assert probabilities == sorted(probabilities, reverse=True)
    assert len(server.predict(encode(2), params={"top_k": 1}).json()["results"][0]["predictions"]) == 1


def test_server_timing_repeats_the_stages(server: Running, encode: Encode) -> None:
    response = server.predict(encode(3))
    (result,) = response.json()["results"]
    timing = dict(part.split(";dur=") for part in response.headers["server-timing"].split(", "))
    assert {stage: float(ms) for stage, ms in timing.items()} == result["latency_ms"]


def test_many_files_in_a_form_are_answered_in_order(
    server: Running, encode: Encode, reference: Reference
) -> None:
    images = [encode(seed, form) for seed in range(4) for form in ("PNG", "JPEG", "WEBP")]
    response = server.client.post(
        "/predict",
        files=[("file", (f"{n}.img", image, "image/png")) for n, image in enumerate(images)],
        params={"top_k": 10},
    )
    results = response.json()["results"]
    assert [result["filename"] for result in results] == [f"{n}.img" for n in range(len(images))]
    for image, result in zip(images, results, strict=True):
        # A batch of another size may round differently in the last bit.
        np.testing.assert_allclose(_probabilities(result), reference(image), atol=1e-6)


@pytest.mark.parametrize(
    ("sent", "filename"),
    [
        ('; filename="naïve 中.png"', "naïve 中.png"),
        ("; filename*=UTF-8''na%C3%AFve%20%E4%B8%AD.png", "naïve 中.png"),
        ("; filename=\"a.png\"; filename*=iso-8859-1'en'na%EFve.png", "naïve.png"),
        ('; filename=""', ""),
        ('; filename="a;b=c ; d.png"', "a;b=c ; d.png"),
        (';\r\n filename="on a line of its own.png"', "on a line of its own.png"),
        ("", None),
    ],
)
def test_a_files_name_is_repeated_however_it_was_sent(
    server: Running, encode: Encode, sent: str, filename: str | None
) -> None:
    head = f'--b\r\nContent-Disposition: form-data; name="file"{sent}\r\n\r\n'.encode()
    response = server.client.post(
        "/predict",
        content=head + encode(1) + b"\r\n--b--\r\n",
        headers={"Content-Type": "multipart/form-data; boundary=b"},
    )
    assert response.json()["results"][0]["filename"] == filename


def test_the_engine_is_chosen_by_name(server: Running, encode: Encode, reference: Reference) -> None:
    image = encode(4)
    answer = server.predict(image, params={"engine": "other", "top_k": 10}).json()
    assert answer["engine"]["name"] == "other"
    assert answer["engine"]["precision"] == "fp16"
    np.testing.assert_array_equal(_probabilities(answer["results"][0]), reference(image, "other-v1"))


def test_every_response_belongs_to_its_request_under_concurrency(
    server: Running, encode: Encode, reference: Reference
) -> None:
    images = [encode(seed) for seed in range(64)]
    expected = [reference(image) for image in images]

    def ask(number: int) -> tuple[int, dict]:
        return number, server.predict(images[number], params={"top_k": 10}).json()["results"][0]

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, [n % 64 for n in range(512)]))
    for number, result in answers:
        np.testing.assert_allclose(_probabilities(result), expected[number], atol=1e-6)
    assert max(result["batch_size"] for _, result in answers) > 1, "no batch formed, so nothing was tested"


@pytest.mark.parametrize("size", [(640, 427), (31, 200), (32, 32)])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_the_engine_sees_what_the_evaluation_sees(
    server: Running, encode: Encode, reference: Reference, form: str, size: tuple[int, int]
) -> None:
    image = encode(5, form, size)
    assert load_pixels(image, Preprocessing(resize=32, height=32, width=32)).shape == (32, 32, 3)
    (result,) = server.predict(image, params={"top_k": 10}).json()["results"]
    np.testing.assert_array_equal(_probabilities(result), reference(image))


def test_a_client_may_name_its_request(server: Running, encode: Encode) -> None:
    response = server.predict(encode(6), headers={"X-Request-Id": "order-17"})
    assert response.headers["x-request-id"] == response.json()["request_id"] == "order-17"
    odd = server.predict(encode(6), headers={"X-Request-Id": "a b"})
    assert odd.headers["x-request-id"] != "a b"


@pytest.mark.parametrize(
    "content_type",
    ["image/jpg", "image/pjpeg", "image/x-png", "application/octet-stream", "Image/PNG; charset=binary", ""],
)
@pytest.mark.parametrize("path", ["/predict", "/%70redict"])
def test_the_bytes_decide_what_an_image_is(
    server: Running, encode: Encode, reference: Reference, path: str, content_type: str
) -> None:
    image = encode(7, "JPEG", quality=90)
    headers = {"Content-Type": content_type} if content_type else {}
    (result,) = server.client.post(path, content=image, headers=headers).json()["results"]
    assert result["predictions"][0]["index"] == reference(image).argmax()


@pytest.mark.parametrize("path", ["/", "/health/live", "/health/ready", "/v2/health/ready", "/metrics"])
def test_head_is_answered_as_get_without_a_body(server: Running, path: str) -> None:
    head, get = server.client.head(path), server.client.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
    assert server.client.head("/predict").status_code == 405


def test_pages_of_other_sites_may_ask_where_that_is_set(
    engine_dir: Path, server: Running, encode: Encode
) -> None:
    origin = {"Origin": "https://shop.example"}
    asks = {
        **origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type",
    }
    settings = Settings(
        engine="tiny",
        engine_dir=engine_dir,
        port=0,
        cors_origin="https://shop.example/, http://localhost:3000",
    )
    with running(settings) as it:
        preflight = it.client.options("/predict", headers=asks)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://shop.example"
        for image, status in ((encode(0), 200), (b"no image", 400)):
            answer = it.predict(image, headers=origin)
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] == "https://shop.example"
            assert "Server-Timing" in answer.headers["access-control-expose-headers"]
        other = it.predict(encode(0), headers={"Origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers
        assert it.client.post("/engines/tiny/load", headers=origin).status_code == 403
    assert server.client.options("/predict", headers=asks).status_code == 405
    assert "access-control-allow-origin" not in server.predict(encode(0), headers=origin).headers


def test_the_openapi_document_describes_both_kinds_of_body(server: Running) -> None:
    operation = server.client.get("/openapi.json").json()["paths"]["/predict"]["post"]
    content = operation["requestBody"]["content"]
    assert content["multipart/form-data"]["schema"]["properties"]["file"]["type"] == "array"
    assert content["image/jpeg"]["schema"] == {"type": "string", "format": "binary"}
    assert set(operation["responses"]) >= {"200", "400", "404", "413", "415", "422", "429", "503", "504"}
    assert "text/html" in server.client.get("/docs").headers["content-type"]
