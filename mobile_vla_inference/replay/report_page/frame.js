// What follows the cursor: facts, velocities, the image with the arcs on it, and the dots on the path.
function fill(list, facts) {
  list.replaceChildren(...facts.flatMap(([name, value]) => {
    const term = document.createElement("dt");
    const text = document.createElement("dd");
    term.textContent = name;
    text.textContent = value;
    return [term, text];
  }));
}

function dropText(drop, lost) {
  return lost ? `not stepped: ${drop}` : `not stepped (${drop}), the last command goes on`;
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
    ["policy", drop ? dropText(drop, data.lost[cursor]) : `stepped${stepMs === null ? "" : `, ${stepMs.toFixed(1)} ms`}`],
  ];
  if (reset) facts.push(["LSTM state", `reset before: ${reset}`]);
  facts.push(["training", !data.seen ? "not recorded" : data.seen[cursor] ? "saw this image" : "didn't see this image"]);
  fill(element("facts"), facts);
  data.series.forEach((series, row) => {
    data.axes.forEach((_, column) => {
      const values = series.values[column];
      const holds = series.key === "predicted" || series.key === "against";
      valueCells[row][column].textContent = number(holds ? inForce(values, cursor) : values[cursor]);
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
    for (const legend of document.querySelectorAll(".path-legend")) legend.append(entry.cloneNode(true));
  }
}

// The path that a velocity drives over the next ARC_S seconds, in metres: points [x ahead, y left, yaw].
const ARC_S = 2, ARC_POINTS = 24, TURN_RADIUS_M = 0.2;

function arc([x, y, turn]) {
  const points = [];
  const turnsInPlace = Math.hypot(x, y) * ARC_S < 0.05 && Math.abs(turn) * ARC_S > 0.05;
  for (let step = 0; step <= ARC_POINTS; step++) {
    const time = (ARC_S * step) / ARC_POINTS, yaw = turn * time;
    if (turnsInPlace) {
      // A turn in place has no path: show a part of a circle around the robot, from ahead to its new heading.
      points.push([TURN_RADIUS_M * Math.cos(yaw), TURN_RADIUS_M * Math.sin(yaw)]);
      continue;
    }
    const along = Math.abs(yaw) < 1e-6 ? time : Math.sin(yaw) / turn;
    const across = Math.abs(yaw) < 1e-6 ? 0 : (1 - Math.cos(yaw)) / turn;
    points.push([along * x - across * y, across * x + along * y]);
  }
  return points;
}

// A camera as a guess: level, 60 degrees wide, 0.28 m above the floor, the robot's own place at the lower edge.
function project([x, y], width, height) {
  const focal = width / 2 / Math.tan(Math.PI / 6), aboveFloor = 0.28;
  const behind = (focal * aboveFloor) / (0.46 * height);
  const depth = Math.max(x + behind, 0.05);
  return [width / 2 - (focal * y) / depth, height / 2 + (focal * aboveFloor) / depth];
}

// One arc for each command: where it would drive over the next seconds. The arrow's head is at the end.
function drawArcs() {
  const board = element("arcs");
  const image = element("frame");
  const width = image.naturalWidth || 320, height = image.naturalHeight || 240;
  board.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const unit = height / 100;
  const drawn = [];
  for (const series of data.series) {
    if (series.key === "gated" || !series.values.length) continue;
    const velocity = [0, 1, 2].map((axis) => {
      const column = data.axes.findIndex((each) => each.column === axis);
      if (column < 0) return 0;
      const values = series.values[column];
      return series.key === "recorded" ? values[cursor] : inForce(values, cursor);
    });
    if (velocity.some((value) => value === null)) continue;
    const points = arc(velocity).map((point) => project(point, width, height));
    const stroke = `var(--${series.key})`;
    const tip = points[points.length - 1], before = points[points.length - 2];
    const length = Math.hypot(tip[0] - before[0], tip[1] - before[1]);
    drawn.push(svg("path", {
      d: `M${points.map((point) => point.map((each) => each.toFixed(1)).join(" ")).join("L")}`,
      class: "arc", "data-key": series.key, stroke, "stroke-width": (series.key === "recorded" ? 2.6 : 1.8) * unit,
      "stroke-dasharray": DASHES[series.key].map((dash) => dash * unit * 0.5).join(" "),
    }));
    if (length > 0.01 * unit) {
      const [ux, uy] = [(tip[0] - before[0]) / length, (tip[1] - before[1]) / length];
      const head = [[5, 0], [-1, 3.2], [-1, -3.2]]
        .map(([far, side]) => [tip[0] + (ux * far - uy * side) * unit, tip[1] + (uy * far + ux * side) * unit]);
      drawn.push(svg("polygon", { points: head.join(" "), fill: stroke }));
    } else {
      drawn.push(svg("circle", { cx: tip[0], cy: tip[1], r: 2 * unit, fill: stroke }));
    }
  }
  board.replaceChildren(...drawn);
}

// The dots on the paths seen from above.
function placeDots() {
  for (const dot of document.querySelectorAll("circle[data-path]")) {
    const [x, y] = data.paths[dot.dataset.path][cursor];
    dot.setAttribute("cx", x);
    dot.setAttribute("cy", y);
  }
}

function showPicture() {
  const image = element("frame");
  const which = pictures.frames.length ? lastUpTo(pictures.frames, cursor) : -1;
  element("no-picture").hidden = which >= 0;
  image.hidden = which < 0;
  if (which < 0) return drawArcs();
  const source = `data:image/jpeg;base64,${pictures.jpeg[which]}`;
  if (image.dataset.frame !== String(pictures.frames[which])) {
    image.dataset.frame = pictures.frames[which];
    image.src = source;
  }
  drawArcs();
}
