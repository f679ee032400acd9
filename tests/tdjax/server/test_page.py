"""The page in a browser, with workers that need no model."""

import shutil
from pathlib import Path

import pytest
from server_cases import encoded, serving, until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,  # a browser starts
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed"),
]


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def opened(browser):
    """Opens a page; what its script or its policy complains of fails the test."""
    contexts, wrong = [], []

    def open_page(url, known=True, **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "console",
            lambda line: "Content Security Policy" in line.text and wrong.append(line.text),
        )
        page.goto(url)
        if known:
            page.wait_for_selector("#model:has-text('steps')")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


def test_a_video_is_made_by_keyboard_alone(served, opened):
    page = opened(served.url)
    assert "stub · 64x48, 5 frames, 4 steps" in page.inner_text("#model")
    page.keyboard.press("Tab")
    page.keyboard.type("a fox <b>&")
    page.keyboard.press("Tab")  # an example
    for value in ("32x32", "9", "2", "7"):
        page.keyboard.press("Tab")
        page.keyboard.type(value)
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("#jobs video")
    job = served.client.get("/v1/videos?limit=1").json()["data"][0]
    assert (job["prompt"], job["size"], job["num_frames"]) == ("a fox <b>&", "32x32", 9)
    assert (job["num_steps"], job["seed"]) == (2, 7)
    assert page.inner_text(".prompt") == "a fox <b>&"
    page.fill("#prompt", "")
    page.click("text=Use again")
    assert page.input_value("#prompt") == "a fox <b>&" and page.input_value("#seed") == "7"
    page.click("text=Delete")
    page.wait_for_selector("#jobs li", state="detached")
    page.click("#example")
    assert page.input_value("#prompt") == "a stub"


def test_progress_errors_and_cancelling_are_seen(served, opened):
    page = opened(served.url)
    page.fill("#prompt", "sleep 30")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#jobs .facts:has-text('denoise')")
    assert page.get_attribute("#jobs progress", "value") != "0"
    page.wait_for_selector("#jobs img[alt='a preview']")
    page.click("text=Cancel")
    page.wait_for_selector("#jobs .empty:has-text('cancelled')")
    page.fill("#prompt", "fail")
    page.click("#go")
    page.wait_for_selector("#jobs .bad")
    assert "ask for less" in page.inner_text("#jobs .bad")
    page.fill("#size", "33x33")
    page.click("#go")
    page.wait_for_selector("#said.bad")
    assert "width is 33" in page.inner_text("#said") or "height is 33" in page.inner_text("#said")
    for job in served.client.get("/v1/videos").json()["data"]:
        served.client.delete(f"/v1/videos/{job['id']}")


def test_lora_files_are_chosen_and_old_videos_searched_and_paged(tmp_path, opened):
    folder = tmp_path / "loras"
    folder.mkdir()
    for name in ("ink", "sketch"):
        (folder / f"{name}.safetensors").touch()
    with serving(tmp_path / "s", loras=folder) as server:
        ids = [server.add(f"{'boat' if n == 3 else 'fox'} {n}") for n in range(14)]
        server.ended(ids[-1])
        page = opened(server.url)
        page.wait_for_selector("#jobs li:nth-child(12)")
        prompts = lambda: page.locator(".prompt").all_inner_texts()
        assert prompts() == [f"{'boat' if n == 3 else 'fox'} {n}" for n in range(13, 1, -1)]
        page.click("#older")
        page.wait_for_selector(".prompt:has-text('fox 0')")
        assert prompts() == ["fox 1", "fox 0"]
        page.click("#newer")
        page.wait_for_selector(".prompt:has-text('fox 13')")
        page.fill("#search", "BOAT")
        page.wait_for_selector(".prompt:has-text('fox')", state="detached")
        assert prompts() == ["boat 3"]
        page.fill("#search", "no such words")
        page.wait_for_selector("#none:has-text('No prompt')")
        page.fill("#prompt", "a cat")
        page.focus(".lora:nth-child(2) input")
        page.keyboard.press("Space")
        page.keyboard.press("Tab")
        page.keyboard.type("0.5")
        page.keyboard.press("Control+Enter")  # in any field
        page.wait_for_selector(".facts:has-text('sketch 0.5')")
        newest = server.client.get("/v1/videos?limit=1").json()["data"][0]
        assert newest["lora"] == [{"name": "sketch", "weight": 0.5}]
        page.click(".lora:nth-child(2) label")
        page.click("#jobs li:first-child >> text=Use again")
        assert page.is_checked(".lora:nth-child(2) input")
        assert not page.is_checked(".lora:nth-child(1) input")
        server.ended(newest["id"])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_light_and_dark(served, opened, scheme):
    ids = [served.add("a prompt-without-a-blank-" + "x" * 200) for _ in range(2)]
    for id in ids:
        served.ended(id)
    page = opened(
        served.url, viewport={"width": 360, "height": 740}, color_scheme=scheme, has_touch=True
    )
    page.wait_for_selector("#jobs video")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    small = page.evaluate(
        "[...document.querySelectorAll('button, input, textarea, select')].filter((e) =>"
        " e.offsetParent && e.getBoundingClientRect().height < 34).map((e) => e.outerHTML)"
    )
    assert not small
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input, textarea, select')].filter((e) => !e.labels.length)"
        ".map((e) => e.id)"
    )
    assert not unnamed
    colors = page.evaluate(
        "(({color, backgroundColor}) => [color, backgroundColor])(getComputedStyle(document.body))"
    )
    light = [sum(int(n) for n in each[4:-1].split(",")) for each in colors]
    assert abs(light[0] - light[1]) > 450 and (light[0] > light[1]) == (scheme == "dark")
    for id in ids:
        served.client.delete(f"/v1/videos/{id}")


def test_a_key_is_asked_for_and_an_image_is_sent(tmp_path, opened):
    from tdjax.server.keys import Key, Keys, digest

    keys = Keys({digest("secret"): Key(name="alice")})
    (tmp_path / "image.png").write_bytes(encoded(size=(64, 48)))
    with serving(tmp_path / "s", task="i2v", keys=keys) as server:
        page = opened(server.url, known=False)
        page.wait_for_selector("#key", state="visible")
        page.fill("#key", "secret")
        page.keyboard.press("Tab")
        page.wait_for_selector("#drop", state="visible")
        page.fill("#prompt", "a boat")
        page.set_input_files("#image", str(tmp_path / "image.png"))
        page.wait_for_selector("#preview", state="visible")
        page.click("#go")
        page.wait_for_selector("#jobs video")
        headers = {"Authorization": "Bearer secret"}
        (job,) = server.client.get("/v1/videos", headers=headers).json()["data"]
        assert job["warnings"] == ["image: True"]
        assert "image: True" in page.inner_text("#jobs li")
        until(lambda: not list(Path(tmp_path / "s" / "inputs").iterdir()))
