"""A picture that can be painted on: with the mouse, a pen or a finger by dragging, by keyboard with the arrows.

The page knows nothing of what is shown. It reports what happened on one rectangle of the picture, `area`, as
a list of events, and Python answers with a new picture:

    ["down", x, y], ["move", x, y]    the pointer, in pixels of the picture: a press, then the way while it is held
    ["key", name]                     "ArrowLeft" ... "ArrowDown", " " or "Enter"
    ["focus"]                         the rectangle was reached with the keyboard

Events that come while Python is busy wait in the page and go out together with the next answer, so that a
slow kernel draws fewer pictures and loses no cell. The rectangle takes the keyboard (JupyterLab's own
shortcuts are off while it has the focus); for screen readers it has the name `label`, the picture the name
`alt`, and `spoken` is read out whenever it changes.

NOTE the stock Image widget has no pointer or key events; anywidget is how a widget brings its own script.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anywidget
from traitlets import Bytes, Int, List, Unicode

SCRIPT = """
const KEYS = ["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", " ", "Enter"];

function render({ model, el }) {
  const frame = document.createElement("div"), picture = document.createElement("img");
  const pad = document.createElement("div"), voice = document.createElement("div");
  el.classList.add("painted-image");
  frame.className = "painted-frame";
  picture.className = "explorer-picture";
  picture.draggable = false;
  pad.className = "painted-pad";
  pad.tabIndex = 0;
  pad.setAttribute("role", "application");
  pad.dataset.lmSuppressShortcuts = "true";  // JupyterLab takes arrows and letters otherwise
  voice.className = "painted-voice";
  voice.setAttribute("aria-live", "polite");
  frame.append(picture, pad, voice);
  el.append(frame);

  let address = null;
  const on = {
    value() {
      const before = address;
      address = URL.createObjectURL(new Blob([model.get("value")], { type: "image/png" }));
      picture.src = address;
      if (before) URL.revokeObjectURL(before);
    },
    alt() { picture.alt = model.get("alt"); },
    label() { pad.setAttribute("aria-label", model.get("label")); },
    spoken() { voice.textContent = model.get("spoken"); },
    area() {
      const [width, height] = [model.get("width"), model.get("height")], [x, y, w, h] = model.get("area");
      picture.width = width;
      picture.height = height;
      frame.style.width = width + "px";
      const share = (part, whole) => 100 * part / whole + "%";
      Object.assign(pad.style, { left: share(x, width), top: share(y, height),
        width: share(w, width), height: share(h, height) });
    },
  };
  for (const name in on) { on[name](); model.on("change:" + name, on[name]); }

  let waiting = [], busy = false;  // one message at a time is on its way
  const flush = () => {
    if (busy || !waiting.length) return;
    busy = true;
    model.send({ events: waiting });
    waiting = [];
  };
  const report = (...event) => { waiting.push(event); flush(); };
  const answered = () => { busy = false; flush(); };
  model.on("msg:custom", answered);

  const place = (event) => {
    const box = picture.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width * model.get("width"),
      (event.clientY - box.top) / box.height * model.get("height")];
  };
  let held = null;
  pad.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    event.preventDefault();
    held = event.pointerId;
    pad.setPointerCapture(held);
    pad.focus({ preventScroll: true });
    report("down", ...place(event));
  });
  pad.addEventListener("pointermove", (event) => {
    if (event.pointerId === held) report("move", ...place(event));
  });
  const release = (event) => { if (event.pointerId === held) held = null; };
  pad.addEventListener("pointerup", release);
  pad.addEventListener("pointercancel", release);
  pad.addEventListener("keydown", (event) => {
    if (!KEYS.includes(event.key) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation();
    report("key", event.key);
  });
  pad.addEventListener("focus", () => { if (pad.matches(":focus-visible") && held === null) report("focus"); });

  return () => {
    for (const name in on) model.off("change:" + name, on[name]);
    model.off("msg:custom", answered);
    if (address) URL.revokeObjectURL(address);
  };
}
export default { render };
"""

STYLE = """
.painted-image { max-width: 100%; }
.painted-image .painted-frame { position: relative; max-width: 100%; }
.painted-image .painted-frame img.explorer-picture { display: block; width: 100%; max-width: 100%; height: auto; margin: 0; }
.painted-image .painted-pad { position: absolute; cursor: crosshair; touch-action: none; }
.painted-image .painted-pad:focus { outline: 2px solid #0072B2; }
.painted-image .painted-voice { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
"""  # noqa: E501


class PaintedImage(anywidget.AnyWidget):
    """A PNG picture of `width` x `height` pixels that reports what is done on its rectangle `area`.

    Args:
        width, height: of the picture, in pixels.
        label: names the rectangle for screen readers and says which keys do what.
        on_events: called with the list of events, see above.
    """

    _esm = SCRIPT
    _css = STYLE
    value = Bytes().tag(sync=True)
    width = Int(1).tag(sync=True)
    height = Int(1).tag(sync=True)
    area = List(Int(), [0, 0, 0, 0]).tag(sync=True)  # left, top, width, height, in pixels of the picture
    alt = Unicode().tag(sync=True)
    label = Unicode().tag(sync=True)
    spoken = Unicode().tag(sync=True)

    def __init__(self, width: int, height: int, label: str, on_events: Callable[[list[list[Any]]], None]) -> None:
        super().__init__(width=width, height=height, label=label)
        self._on_events = on_events
        self.on_msg(self._receive)

    def show(self, png: bytes, alt: str) -> None:
        """Exchange the picture and its alt text, in one message to the page."""
        with self.hold_sync():
            self.value = png
            self.alt = alt

    def _receive(self, widget: PaintedImage, content: dict[str, Any], buffers: list) -> None:
        try:
            self._on_events(content["events"])
        finally:
            self.send({"answered": True})  # the page may send what happened in the meantime
