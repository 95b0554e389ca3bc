"""The report in a real browser: headless Chromium, offline, driven over WebDriver."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil

import pytest

from rto_fast.report.charts import Chart, Curve
from rto_fast.report.page import Table, write_report
from rto_fast.report.samples import ReportSample

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
MISSING = [
    name
    for name, there in (
        ("chromium", BROWSER),
        ("chromedriver (Debian: chromium-driver)", DRIVER),
        ("selenium", importlib.util.find_spec("selenium")),
    )
    if not there
]
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--hide-scrollbars", "--window-size=1280,1000", "--force-color-profile=srgb",
)  # fmt: skip
HOSTILE = '</span><script>document.title="owned"</script><img src="https://evil.example/x.png">'


def metrics():
    return [
        {
            "step": s, "samples": 64 * s, "reward/score": math.log(s), "reward/rm": 0.5 * math.log(s),
            "kl/response": 0.2 * s, "policy/entropy": 2.0 - 0.01 * s, "policy/clip_fraction": 0.1,
            "critic/clip_fraction": None if s == 5 else 0.05, "policy/lr": 5e-7, "response/length": 40.0 + s,
            "time/rollout_s": 2.0, "time/train_s": 1.0, "rate/rollout_tokens_s": 1500.0, "memory/peak_gib": 1.2,
        }
        for s in range(1, 31)
    ]  # fmt: skip


def samples():
    tokens = ["Once", " upon", " a", " time", ",\n", HOSTILE, "</s>"]
    figures = {
        "token_reward": [0.05, -0.05, 0.02, -0.01, 0.0, 0.01, 2.0],
        "advantage": [-1.0, 1.0, -0.5, 0.5, 0.0, 0.25, 0.1],
        "dpo_reward": [0.05, -0.05, 0.02, -0.01, 0.0, 0.01, 0.03],
        "kl": [-0.1, 0.2, 0.3, -0.4, 0.0, math.nan, 0.1],
        "value": [1.0] * 7,
    }
    first = ReportSample("Tell <b>me</b>.", tokens, **figures, score=2.0, truncated=False, step=30, label="RTO")
    empty = ReportSample("Tell me.", [], [], [], [], [], [], score=0.0, truncated=True, step=30)
    return [first, empty]


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(browser, tmp_path_factory):
    """The report, opened; logs: (console lines, requested URLs) while it loaded."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    seeds = [Curve("RTO", [0, 64, 128], [0.0, 1.0, 1.5]), Curve("PPO", [0, 64, 128], [0.0, 0.4, 0.7])]
    write_report(
        path,
        title="RTO & PPO",
        metrics=metrics(),
        samples=samples(),
        settings={"beta1": 0.05, "reward_model": ("runs/rm",)},
        comparison=[Chart("True reward against samples", seeds, "responses drawn", "true reward")],
        tables=[Table("Results", ["method", "true reward"], [["PPO", "0.7"], ["RTO", "1.5"]], best=1)],
    )
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(path.as_uri())
    return browser, path.as_uri()


def tokens(driver):
    """[H] (background, opacity) of the first response's tokens as computed by the browser."""
    colours = driver.execute_script(
        "return [...document.querySelectorAll('.response')][0].querySelectorAll('.t')"
        ".values().map(t => getComputedStyle(t).backgroundColor).toArray()"
    )
    parsed = []
    for colour in colours:
        numbers = [float(n) for n in colour[colour.index("(") + 1 : -1].split(",")]
        parsed.append((tuple(numbers[:3]), numbers[3] if len(numbers) > 3 else 1.0))
    return parsed


def choose(driver, label):
    from selenium.webdriver.common.by import By

    driver.find_element(By.XPATH, f"//fieldset//label[normalize-space()='{label}']").click()


def bluer(colour):
    (red, _, blue), _ = colour
    return blue > red


def test_curves_are_drawn(page):
    driver, _ = page
    boxes = driver.execute_script(
        """return [...document.querySelectorAll('.chart')].map(chart => {
          const box = e => e.getBoundingClientRect();
          const lines = [...chart.querySelectorAll('svg [id*="axes_1"] path')].filter(p => {
            const style = getComputedStyle(p);
            return /var\\(--c[0-9]/.test(p.getAttribute('style'))  // a series, not a grid line
              && (style.stroke !== 'none' || style.fill !== 'none') && box(p).width > 100;
          });
          const svg = box(chart.querySelector('svg')), card = box(chart);
          return {title: chart.querySelector('h3').textContent, lines: lines.length, width: svg.width,
            height: svg.height, inside: svg.left >= card.left && svg.right <= card.right + 1,
            words: chart.querySelectorAll('svg text').length};
        })"""
    )
    assert len(boxes) >= 10
    for box in boxes:
        assert box["lines"] >= 1, box
        assert box["width"] > 200, box
        assert box["height"] > 80, box
        assert box["inside"], box
        assert box["words"] >= 4, box
    assert boxes[0]["title"] == "True reward against samples"
    assert boxes[0]["lines"] >= 2


def test_series_have_different_colours_of_the_page(page):
    driver, _ = page
    strokes = driver.execute_script(
        """return [...document.querySelector('.chart').querySelectorAll('[id*="line2d"] path')]
          .filter(p => p.getAttribute('clip-path')).map(p => getComputedStyle(p).stroke)"""
    )
    assert len(set(strokes)) >= 2
    assert "none" not in set(strokes[-2:])


def test_tokens_are_coloured_by_sign_and_size(page):
    driver, _ = page
    choose(driver, "token reward")
    once, upon, a, time, comma, _, end = tokens(driver)
    assert bluer(once)
    assert not bluer(upon)
    assert bluer(a)
    assert not bluer(time)
    assert comma[1] == 0.0
    assert end[1] >= once[1] > a[1] > time[1] > 0
    assert once[1] == pytest.approx(upon[1])  # symmetric about 0


def test_the_switch_recolours_tokens_and_legend(page):
    driver, _ = page
    choose(driver, "advantage")
    once, upon, *_ = tokens(driver)
    assert not bluer(once)
    assert bluer(upon)
    text = "return document.getElementById(arguments[0]).textContent"
    assert driver.execute_script(text, "high") == "≥ +1"
    assert driver.execute_script(text, "low") == "≤ −1"
    assert "credit" in driver.execute_script(text, "meaning")
    choose(driver, "KL")
    hatched = driver.execute_script("return getComputedStyle(document.querySelectorAll('.t')[5]).backgroundImage")
    assert "gradient" in hatched  # not finite: neither colour
    choose(driver, "value")
    assert all(bluer(t) for t in tokens(driver))
    choose(driver, "token reward")
    assert bluer(tokens(driver)[0])


def test_a_token_tells_its_figures_to_pointer_and_keyboard(page):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    driver, _ = page
    found = driver.find_elements(By.CSS_SELECTOR, ".t")
    readout = driver.find_element(By.CSS_SELECTOR, ".readout")
    driver.execute_script("document.querySelector('.t').scrollIntoView({block: 'center'})")
    ActionChains(driver).move_to_element(found[1]).perform()
    assert readout.text.startswith('2/7 " upon": token reward −0.05, advantage +1,')
    assert readout.text == found[1].get_attribute("title")
    driver.execute_script("document.querySelector('.t').focus()")
    ActionChains(driver).send_keys(Keys.END).perform()
    assert readout.text.startswith('7/7 "</s>": token reward +2,')
    ActionChains(driver).send_keys(Keys.ARROW_LEFT).perform()
    assert readout.text.startswith("6/7")


def test_the_pointer_on_a_chart_shows_its_figures(page):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    driver, _ = page
    plot = driver.find_element(By.CSS_SELECTOR, ".chart svg")
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", plot)
    ActionChains(driver).move_to_element_with_offset(plot, plot.size["width"] // 2 - 6, 0).perform()
    tip = driver.find_element(By.CSS_SELECTOR, ".tip")
    assert tip.text.splitlines() == ["responses drawn 128", "RTO 1.5", "PPO 0.7"]
    spot, line = driver.execute_script(
        """const chart = document.querySelector('.chart'), box = e => e.getBoundingClientRect();
        const dot = box(chart.querySelector('circle')), paths = [...chart.querySelectorAll('[id*="line2d"] path')];
        const rto = box(paths.filter(p => p.getAttribute('clip-path') && box(p).height > 50)[0]);
        return [[dot.x + dot.width / 2, dot.y + dot.height / 2], [rto.right, rto.top]]"""
    )
    assert spot == pytest.approx(line, abs=3)  # the dot sits at the drawn line's end
    ActionChains(driver).move_to_element(driver.find_element(By.TAG_NAME, "h1")).perform()
    assert not driver.find_elements(By.CSS_SELECTOR, ".tip")


def test_hostile_text_is_text(page):
    driver, _ = page
    assert driver.title == "RTO & PPO"
    assert HOSTILE in driver.execute_script(
        "return document.querySelectorAll('.t')[5].textContent.replaceAll('·', ' ')"
    )
    assert driver.execute_script("return document.images.length") == 0
    assert driver.execute_script("return document.scripts.length") == 1


@pytest.mark.parametrize("width", [1280, 420])
def test_nothing_is_wider_than_the_window(page, width):
    driver, _ = page
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    wide = driver.execute_script("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert wide == 0


def test_a_dark_scheme_is_followed(page):
    driver, _ = page
    light = driver.execute_script("return getComputedStyle(document.querySelector('.chart svg text')).fill")
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    body = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    text = driver.execute_script("return getComputedStyle(document.querySelector('.chart svg text')).fill")
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert body == "rgb(18, 21, 27)"
    assert text != light


def test_no_console_message_and_no_request_but_the_file(page):
    driver, uri = page  # last: covers everything that the tests above have done on the page
    assert driver.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert asked == [uri]
