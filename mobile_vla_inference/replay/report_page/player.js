// The cursor, playing, keys and buttons; and the start of the page.
let playing = null;

function show(index) {
  cursor = Math.max(0, Math.min(count - 1, index));
  element("scrubber").value = cursor;
  element("scrubber").setAttribute("aria-valuetext", timeText(times[cursor]));
  if (times[cursor] < view[0] || times[cursor] > view[1]) zoom(1);
  placeCursor();
  showFacts();
  showPicture();
  placeDots();
}

// ---- playing --------------------------------------------------------------------------------------------------

function stop() {
  if (playing !== null) cancelAnimationFrame(playing);
  playing = null;
  element("play").textContent = "play";
  element("play").setAttribute("aria-pressed", "false");
}

function play() {
  if (playing !== null) return stop();
  if (cursor >= count - 1) show(0);
  element("play").textContent = "pause";
  element("play").setAttribute("aria-pressed", "true");
  let time = times[cursor], before = performance.now();
  const tick = (now) => {
    time += ((now - before) / 1000) * Number(element("speed").value) * data.units_per_s;
    before = now;
    const index = lastUpTo(times, time);
    if (index !== cursor) show(index);
    if (cursor >= count - 1) return stop();
    playing = requestAnimationFrame(tick);
  };
  playing = requestAnimationFrame(tick);
}

const go = (index) => { stop(); show(index); };
const KEYS = {
  ArrowLeft: (event) => go(cursor - (event.shiftKey ? 10 : 1)),
  ArrowRight: (event) => go(cursor + (event.shiftKey ? 10 : 1)),
  Home: () => go(0),
  End: () => go(count - 1),
  " ": play,
  "+": () => zoom(0.5),
  "=": () => zoom(0.5),
  "-": () => zoom(2),
  0: () => zoom(Infinity),
};

function listen() {
  document.addEventListener("keydown", (event) => {
    const onButton = event.target.closest("button, select, a");
    if (event.ctrlKey || event.altKey || event.metaKey || !KEYS[event.key] || (onButton && event.key === " ")) return;
    if (event.target.closest("select")) return;
    event.preventDefault();
    KEYS[event.key](event);
  });
  element("scrubber").addEventListener("input", (event) => go(Number(event.target.value)));
  element("play").addEventListener("click", play);
  element("zoom-in").addEventListener("click", () => zoom(0.5));
  element("zoom-out").addEventListener("click", () => zoom(2));
  element("zoom-all").addEventListener("click", () => zoom(Infinity));
  element("frame").addEventListener("load", drawArcs);
  element("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = getComputedStyle(root).colorScheme.includes("dark");
    root.dataset.theme = dark ? "light" : "dark";
    drawAll();
  });
  for (const button of document.querySelectorAll("button[data-frame]")) {
    button.addEventListener("click", () => go(Number(button.dataset.frame)));
  }
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  new ResizeObserver(drawAll).observe(element("plots"));
}

function start() {
  element("scrubber").max = count - 1;
  addLegend();
  addValues();
  addVelocityPlots();
  addStepPlot();
  addLane();
  listen();
  show(Number(/^#image=(\d+)$/.exec(location.hash)?.[1] ?? 0));
  drawAll();
}

if (count) {
  start();
} else {
  element("no-picture").hidden = false;
  element("frame").hidden = true;
}
