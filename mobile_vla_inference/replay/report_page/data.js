// What every script of the page uses: the data, the place of the cursor, and small helpers.
const element = (id) => document.getElementById(id);
const read = (id) => JSON.parse(element(id).textContent);
const data = read("data");
const pictures = read("pictures");
const count = data.times.length;
const times = data.times;
const DASHES = { recorded: [], predicted: [], gated: [2, 3], against: [6, 4] };
const WIDTHS = { recorded: 2.2, predicted: 1.4, gated: 1.2, against: 1.4 };

let cursor = 0;
let view = [times[0] ?? 0, times[count - 1] ?? 0];

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

// The velocity in force at an image: the newest one up to it, for at most `data.max_gap`; null where there is none.
function inForce(values, index) {
  for (let at = index; at >= 0 && times[index] - times[at] <= data.max_gap; at--) {
    if (values[at] !== null) return values[at];
  }
  return null;
}

function svg(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  return made;
}
