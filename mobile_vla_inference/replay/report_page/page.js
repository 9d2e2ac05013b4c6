"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const element = (id) => document.getElementById(id);
  const data = read("data");
  const pictures = read("pictures");
  const count = data.times.length;
  const times = data.times;
  const SVG = "http://www.w3.org/2000/svg";
  const PLOT_PX = 150, STEP_PX = 90, LANE_PX = 44, LEFT_PX = 46, RIGHT_PX = 8, BOTTOM_PX = 18;
  const DASHES = { recorded: [], predicted: [], gated: [2, 3], against: [6, 4] };
  const WIDTHS = { recorded: 2.2, predicted: 1.4, gated: 1.2, against: 1.4 };

  let cursor = 0;
  let view = [times[0] ?? 0, times[count - 1] ?? 0];
  let playing = null;

  function color(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  }

  // The last position in an ascending list whose value is not beyond `wanted`; 0 where all are.
  function lastUpTo(list, wanted) {
    let low = 0, high = list.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (list[middle] <= wanted) low = middle + 1; else high = middle;
    }
    return Math.max(0, low - 1);
  }

  function nearest(time) {
    const before = lastUpTo(times, time);
    const after = Math.min(count - 1, before + 1);
    return times[after] - time < time - times[before] ? after : before;
  }

  const number = (value, digits = 3) => (value === null ? "-" : (value >= 0 ? "+" : "") + value.toFixed(digits));
  const timeText = (time) => (data.time_unit === "s" ? `${time.toFixed(2)} s` : `image ${time}`);

  // ---- plots ----------------------------------------------------------------------------------------------------

  const plots = [];

  function addPlot(title, height, draw) {
    const box = document.createElement("div");
    box.className = "plot";
    const heading = document.createElement("h3");
    heading.textContent = title;
    const canvas = document.createElement("canvas");
    canvas.style.height = `${height}px`;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", title);
    const line = document.createElement("div");
    line.className = "cursor";
    line.style.height = `${height}px`;
    box.append(heading, canvas, line);
    element("plots").append(box);
    const toFrame = (event) => {
      const area = canvas.getBoundingClientRect();
      const share = (event.clientX - area.left - LEFT_PX) / (area.width - LEFT_PX - RIGHT_PX);
      show(nearest(view[0] + share * (view[1] - view[0])));
    };
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      stop();
      toFrame(event);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (event.buttons) toFrame(event);
    });
    plots.push({ canvas, line, height, draw });
  }

  function drawPlot({ canvas, height, draw }) {
    const width = canvas.clientWidth;
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    const pen = canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.font = "11px system-ui, sans-serif";
    const span = view[1] - view[0] || 1;
    draw(pen, {
      width,
      right: width - RIGHT_PX,
      bottom: height - BOTTOM_PX,
      x: (time) => LEFT_PX + ((time - view[0]) / span) * (width - LEFT_PX - RIGHT_PX),
    });
  }

  function niceStep(span, most) {
    const raw = span / most || 1;
    const power = 10 ** Math.floor(Math.log10(raw));
    return power * [1, 2, 5, 10].find((factor) => factor * power >= raw * (1 - 1e-9));
  }

  const tickText = (value, step) => value.toFixed(Math.max(0, -Math.floor(Math.log10(step) + 1e-9)));

  function drawTimes(pen, area) {
    const step = niceStep(view[1] - view[0], Math.max(2, area.width / 90));
    pen.fillStyle = color("quiet");
    pen.textAlign = "center";
    for (let time = Math.ceil(view[0] / step) * step; time <= view[1]; time += step) {
      pen.fillText(`${tickText(time, step)}${data.time_unit === "s" ? " s" : ""}`, area.x(time), area.bottom + 13);
    }
  }

  function drawScale(pen, area, low, high) {
    const y = (value) => area.bottom - ((value - low) / (high - low)) * (area.bottom - 6);
    const step = niceStep(high - low, 4);
    pen.textAlign = "right";
    pen.lineWidth = 1;
    for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + step * 1e-6; value += step) {
      pen.strokeStyle = color("line");
      pen.beginPath();
      pen.moveTo(LEFT_PX, Math.round(y(value)) + 0.5);
      pen.lineTo(area.right, Math.round(y(value)) + 0.5);
      pen.stroke();
      pen.fillStyle = color("quiet");
      pen.fillText(tickText(Math.abs(value) < step / 2 ? 0 : value, step), LEFT_PX - 5, y(value) + 4);
    }
    return y;
  }

  // A line through the values in view; values further apart than `data.max_gap` are not joined. Where pixels are
  // fewer than values, each column shows their whole range.
  function drawSeries(pen, area, values, y) {
    const first = lastUpTo(times, view[0]);
    const last = Math.min(count - 1, lastUpTo(times, view[1]) + 1);
    const dense = last - first > 2 * (area.right - LEFT_PX);
    let column = null, low = 0, high = 0, former = null;
    pen.save();
    pen.beginPath();
    pen.rect(LEFT_PX, 0, area.right - LEFT_PX, area.bottom + 1);
    pen.clip();
    pen.beginPath();
    const flush = () => {
      if (column !== null) {
        pen.lineTo(column, y(low));
        pen.lineTo(column, y(high) - 0.01);
      }
    };
    for (let index = first; index <= last; index++) {
      const value = values[index];
      if (value === null) continue;
      const apart = former === null || times[index] - times[former] > data.max_gap;
      if (dense) {
        const at = Math.round(area.x(times[index]));
        if (at === column && !apart) {
          low = Math.min(low, value);
          high = Math.max(high, value);
        } else {
          flush();
          if (apart) pen.moveTo(at, y(value));
          column = at;
          low = high = value;
        }
      } else if (apart) {
        pen.moveTo(area.x(times[index]) - 0.5, y(value));
        pen.lineTo(area.x(times[index]) + 0.5, y(value));
      } else {
        pen.lineTo(area.x(times[index]), y(value));
      }
      former = index;
    }
    flush();
    pen.stroke();
    pen.restore();
  }

  function bounds(lists) {
    let low = 0, high = 0;
    for (const list of lists) {
      for (const value of list) {
        if (value !== null) {
          low = Math.min(low, value);
          high = Math.max(high, value);
        }
      }
    }
    const margin = (high - low) * 0.05 || 0.1;
    return [low < 0 ? low - margin : 0, high + margin];
  }

  function addVelocityPlots() {
    data.axes.forEach((axis, column) => {
      const [low, high] = bounds(data.series.map((series) => series.values[column]));
      addPlot(`${axis.name} (${axis.unit})`, PLOT_PX, (pen, area) => {
        const y = drawScale(pen, area, low, high);
        drawTimes(pen, area);
        for (const series of data.series) {
          pen.strokeStyle = color(series.key);
          pen.lineWidth = WIDTHS[series.key];
          pen.setLineDash(DASHES[series.key]);
          drawSeries(pen, area, series.values[column], y);
        }
        pen.setLineDash([]);
      });
    });
  }

  function addStepPlot() {
    if (!data.step_ms.some((list) => list.values.some((value) => value !== null))) return;
    const [low, high] = bounds(data.step_ms.map((list) => list.values));
    addPlot("policy step (ms)", STEP_PX, (pen, area) => {
      const y = drawScale(pen, area, low, high);
      drawTimes(pen, area);
      for (const list of data.step_ms) {
        pen.strokeStyle = color(list.key);
        pen.lineWidth = 1.2;
        pen.setLineDash(DASHES[list.key]);
        drawSeries(pen, area, list.values, y);
      }
      pen.setLineDash([]);
    });
  }

  // What the gate said as a band; below it a tick where the instruction changed, the state was cleared, or an image
  // was dropped (other than not being due).
  function addLane() {
    addPlot("gate (band); instruction changes ◆, cleared states ▲, dropped images |", LANE_PX, (pen, area) => {
      const edges = [Math.max(0, lastUpTo(times, view[0])), lastUpTo(times, view[1])];
      let start = edges[0];
      pen.save();
      pen.beginPath();
      pen.rect(LEFT_PX, 0, area.right - LEFT_PX, LANE_PX);
      pen.clip();
      for (let index = edges[0]; index <= edges[1]; index++) {
        if (index === edges[1] || data.reason[index + 1] !== data.reason[index]) {
          const from = area.x(times[start]);
          const to = area.x(times[Math.min(count - 1, index + 1)]);
          pen.fillStyle = color(data.reasons[data.reason[index]].color);
          pen.fillRect(from, 4, Math.max(1, to - from), 12);
          start = index + 1;
        }
      }
      pen.textAlign = "center";
      for (let index = edges[0]; index <= edges[1]; index++) {
        const at = area.x(times[index]);
        if (data.lost[index]) {
          pen.fillStyle = color("c1");
          pen.fillRect(at - 0.5, 18, 1, 9);
        }
        if (data.marks[index]) {
          pen.fillStyle = color("text");
          pen.fillText(data.marks[index], at, 28);
        }
      }
      pen.restore();
      drawTimes(pen, { ...area, bottom: LANE_PX - 14 });
    });
  }

  function drawAll() {
    for (const plot of plots) drawPlot(plot);
    placeCursor();
  }

  function placeCursor() {
    const span = view[1] - view[0] || 1;
    for (const { canvas, line } of plots) {
      const share = (times[cursor] - view[0]) / span;
      line.hidden = share < 0 || share > 1;
      line.style.left = `${LEFT_PX - 1 + share * (canvas.clientWidth - LEFT_PX - RIGHT_PX)}px`;
    }
  }

  function zoom(factor) {
    const whole = [times[0], times[count - 1]];
    const span = Math.min(whole[1] - whole[0], Math.max((view[1] - view[0] || 1) * factor, data.least_view));
    const start = Math.min(Math.max(whole[0], times[cursor] - span / 2), whole[1] - span);
    view = [start, start + span];
    drawAll();
  }

  // ---- the cursor -----------------------------------------------------------------------------------------------

  function fill(list, facts) {
    list.replaceChildren(...facts.flatMap(([name, value]) => {
      const term = document.createElement("dt");
      const text = document.createElement("dd");
      term.textContent = name;
      text.textContent = value;
      return [term, text];
    }));
  }

  function showFacts() {
    const stepMs = data.step_ms[0].values[cursor];
    const drop = data.drops[data.drop[cursor]];
    const reset = data.resets[data.reset[cursor]];
    const limit = data.limits[data.limit[cursor]];
    const facts = [
      ["image", `${cursor} of ${count - 1}`],
      ["time", data.time_unit === "s" ? timeText(times[cursor]) : "(stamps are not in order)"],
      ["instruction", data.instructions[data.instruction[cursor]] || "none"],
      ["gate", data.reasons[data.reason[cursor]].name + (limit ? `, changed by: ${limit}` : "")],
      ["policy", drop ? `not stepped: ${drop}` : `stepped${stepMs === null ? "" : `, ${stepMs.toFixed(1)} ms`}`],
    ];
    if (reset) facts.push(["state", `cleared before: ${reset}`]);
    fill(element("facts"), facts);
    data.series.forEach((series, row) => {
      data.axes.forEach((_, column) => {
        valueCells[row][column].textContent = number(series.values[column][cursor]);
      });
    });
  }

  const valueCells = [];

  function addValues() {
    const table = element("values");
    const head = table.createTHead().insertRow();
    head.append(document.createElement("th"));
    for (const axis of data.axes) {
      const cell = document.createElement("th");
      cell.className = "number";
      cell.textContent = `${axis.name} (${axis.unit})`;
      head.append(cell);
    }
    const body = table.createTBody();
    for (const series of data.series) {
      const row = body.insertRow();
      const name = document.createElement("th");
      name.append(key(series), series.name);
      row.append(name);
      valueCells.push(data.axes.map(() => {
        const cell = row.insertCell();
        cell.className = "number";
        return cell;
      }));
    }
  }

  function svg(name, attributes) {
    const made = document.createElementNS(SVG, name);
    for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
    return made;
  }

  function key(series) {
    const made = svg("svg", { viewBox: "0 0 28 10", width: 28, height: 10, "aria-hidden": "true" });
    made.append(svg("line", {
      x1: 0, y1: 5, x2: 28, y2: 5, stroke: `var(--${series.key})`, "stroke-width": WIDTHS[series.key] + 1,
      "stroke-dasharray": DASHES[series.key].join(" "),
    }));
    return made;
  }

  function addLegend() {
    for (const series of data.series) {
      const entry = document.createElement("span");
      entry.className = "key";
      entry.append(key(series), series.name);
      element("legend").append(entry);
    }
  }

  // As the node's debug image draws it: the velocity from above as an arrow, the turn as a bar below.
  function drawArrows() {
    const board = element("arrows");
    const image = element("frame");
    const width = image.naturalWidth || 320, height = image.naturalHeight || 240;
    board.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const unit = height / 100;
    const drawn = data.series.filter((series) => series.key !== "gated" && series.values[0]?.[cursor] != null);
    board.replaceChildren(...drawn.flatMap((series, row) => {
      const [x, y, z] = [0, 1, 2].map((axis) => {
        const column = data.axes.findIndex((each) => each.column === axis);
        return column < 0 ? 0 : (series.values[column][cursor] ?? 0) / data.axes[column].limit;
      });
      // Side by side, so that none hides another.
      const start = [width / 2 + (row - (drawn.length - 1) / 2) * 9 * unit, height * 0.68];
      const tip = [start[0] - y * 30 * unit, start[1] - x * 50 * unit];
      const length = Math.hypot(tip[0] - start[0], tip[1] - start[1]) || 1;
      const ahead = [(tip[0] - start[0]) / length, (tip[1] - start[1]) / length];
      const head = [[5, 0], [0, 3.5], [0, -3.5]]
        .map(([far, side]) => [0, 1].map((k) => tip[k] + (ahead[k] * far + [-ahead[1], ahead[0]][k] * side) * unit));
      const fill = `var(--${series.key})`;
      const bar = height * 0.8 + row * 5 * unit;
      return [
        svg("line", { x1: start[0], y1: start[1], x2: tip[0], y2: tip[1], stroke: fill, "stroke-width": 2.2 * unit }),
        svg("circle", { cx: start[0], cy: start[1], r: 1.6 * unit, fill }),
        svg("polygon", { points: head.join(" "), fill, stroke: "#000", "stroke-width": 0.4 * unit }),
        svg("line", {
          x1: width / 2, y1: bar, x2: width / 2 - z * width * 0.4, y2: bar, stroke: fill, "stroke-width": 3 * unit,
        }),
      ];
    }));
  }

  function showPicture() {
    const image = element("frame");
    const which = pictures.frames.length ? lastUpTo(pictures.frames, cursor) : -1;
    element("no-picture").hidden = which >= 0;
    image.hidden = which < 0;
    if (which < 0) return drawArrows();
    const source = `data:image/jpeg;base64,${pictures.jpeg[which]}`;
    if (image.dataset.frame !== String(pictures.frames[which])) {
      image.dataset.frame = pictures.frames[which];
      image.src = source;
    }
    drawArrows();
  }

  function show(index) {
    cursor = Math.max(0, Math.min(count - 1, index));
    element("scrubber").value = cursor;
    element("scrubber").setAttribute("aria-valuetext", timeText(times[cursor]));
    if (times[cursor] < view[0] || times[cursor] > view[1]) zoom(1);
    placeCursor();
    showFacts();
    showPicture();
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
    element("frame").addEventListener("load", drawArrows);
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

  if (!count) {
    element("no-picture").hidden = false;
    element("frame").hidden = true;
    return;
  }
  element("scrubber").max = count - 1;
  addLegend();
  addValues();
  addVelocityPlots();
  addStepPlot();
  addLane();
  listen();
  show(0);
  drawAll();
})();
