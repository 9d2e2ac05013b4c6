// The plots over time, on canvases: they zoom together, and a click moves the cursor.
const PLOT_PX = 165, STEP_PX = 110, LANE_PX = 66, SEEN_PX = 14, LEFT_PX = 46, RIGHT_PX = 8, BOTTOM_PX = 34;
const TIME_TITLE = data.time_unit === "s" ? "time since the first image (s)" : "image";
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
  line.style.bottom = `${BOTTOM_PX}px`;
  line.style.height = `${height - BOTTOM_PX}px`;
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
    pen.fillText(tickText(time, step), area.x(time), area.bottom + 13);
  }
  pen.fillText(TIME_TITLE, (LEFT_PX + area.right) / 2, area.bottom + 28);
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
  addPlot("time of a policy step (ms)", STEP_PX, (pen, area) => {
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

// What holds between two images as a band of colours: `codes` per image, `fill` makes a colour of a code.
function drawBand(pen, area, codes, fill, top, height) {
  const first = Math.max(0, lastUpTo(times, view[0])), last = lastUpTo(times, view[1]);
  let start = first;
  for (let index = first; index <= last; index++) {
    if (index === last || codes[index + 1] !== codes[index]) {
      const from = area.x(times[start]);
      const to = area.x(times[Math.min(count - 1, index + 1)]);
      pen.fillStyle = fill(codes[index]);
      pen.fillRect(from, top, Math.max(1, to - from), height);
      start = index + 1;
    }
  }
}

function drawMarks(pen, area) {
  const last = lastUpTo(times, view[1]);
  pen.textAlign = "center";
  for (let index = Math.max(0, lastUpTo(times, view[0])); index <= last; index++) {
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
}

// The gate's reasons as a band, marks below it, and below these, where it is recorded, which images training saw.
function addLane() {
  const height = LANE_PX + (data.seen ? SEEN_PX : 0);
  addPlot("gate and events", height, (pen, area) => {
    pen.save();
    pen.beginPath();
    pen.rect(LEFT_PX, 0, area.right - LEFT_PX, height);
    pen.clip();
    drawBand(pen, area, data.reason, (code) => color(data.reasons[code].color), 4, 12);
    drawMarks(pen, area);
    if (data.seen) drawBand(pen, area, data.seen, (seen) => color(seen ? "seen" : "unseen"), 34, 8);
    pen.restore();
    drawTimes(pen, { ...area, bottom: height - BOTTOM_PX });
  });
  addLaneLegend();
}

function addLaneLegend() {
  const swatch = (name, text) => {
    const entry = document.createElement("span");
    entry.className = "key";
    const box = document.createElement("span");
    box.className = "swatch";
    box.style.background = `var(--${name})`;
    entry.append(box, text);
    return entry;
  };
  const words = (text) => {
    const entry = document.createElement("span");
    entry.className = "key";
    entry.textContent = text;
    return entry;
  };
  const entries = data.reasons.map((reason) => swatch(reason.color, `gate: ${reason.name}`));
  if (data.marks.some((mark) => mark.includes("◆"))) entries.push(words("◆ another instruction"));
  if (data.marks.some((mark) => mark.includes("▲"))) entries.push(words("▲ LSTM state reset"));
  if (data.lost.some((lost) => lost)) entries.push(swatch("c1", "image dropped"));
  if (data.seen) entries.push(swatch("seen", "seen in training"), swatch("unseen", "not seen"));
  else entries.push(words("seen in training: not recorded"));
  element("lane-legend").append(...entries);
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
