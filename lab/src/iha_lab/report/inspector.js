// Glue between the selects of the page and plotly.js, which draws. Data are unpacked when needed.
const element = (id) => document.getElementById(id);
async function unpack(id) {
  const bytes = Uint8Array.from(atob(element(id).textContent.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}
const about = JSON.parse(element("about").textContent);
const N = about.tokens.length, size = N * N, layers = new Map();
const dark = matchMedia("(prefers-color-scheme: dark)");
const label = (n) => `${n} ${about.tokens[n]}`;
const every = Math.ceil(N / (innerWidth < 700 ? 18 : 44));
const ticks = [...Array(N).keys()].filter((n) => n % every === 0);
const labels = about.tokens.map((_, n) => label(n));
const axis = { tickvals: ticks.map(label), ticktext: ticks.map((n) => about.tokens[n].slice(0, 10)) };

function fill(select, options, chosen) {
  select.replaceChildren(...options.map(([value, text, off]) => {
    const option = new Option(text, value, false, value === chosen);
    option.disabled = Boolean(off);
    return option;
  }));
}
// The weights of map number i of a layer: the squares of its bytes.
const weights = (bytes, i) =>
  Float32Array.from(bytes.subarray(i * size, (i + 1) * size), (b) => (b / about.levels) ** 2);
const rows = (flat, n, width) =>
  Array.from({ length: n }, (_, i) => Array.from(flat.subarray(i * width, (i + 1) * width)));

function draw(id, figure, trace, axes, height) {
  const ink = getComputedStyle(document.body).color, layout = structuredClone(figure.layout);
  Object.assign(layout, { paper_bgcolor: "transparent", plot_bgcolor: "transparent", font: { color: ink } });
  if (height) layout.height = height;
  for (const name of ["xaxis", "yaxis"]) Object.assign(layout[name], { color: ink, ...axes });
  const whole = { ...structuredClone(figure.trace), ...trace };
  return Plotly.react(id, [whole], layout, { responsive: true, displaylogo: false, displayModeBar: false });
}
const best = (row, count) =>
  Array.from(row, (w, s) => [w, s]).sort((a, b) => b[0] - a[0]).slice(0, count).filter(([w]) => w > 0);

async function show() {
  const l = Number(element("layer").value), layer = about.layers[l];
  if (!layers.has(l)) layers.set(l, await unpack(`layer-${l}`));
  const buffer = layers.get(l), bytes = new Uint8Array(buffer);
  const h = Math.min(Number(element("head").value || about.start[1]), layer.heads - 1);
  fill(element("head"), [...Array(layer.heads).keys()].map((i) => [String(i), `head ${i}`]), String(h));
  const P = layer.keys, place = layer.kept.indexOf(h), pairs = [["all", "all pairs together"]];
  layer.queries.forEach((p, j) => {
    for (let q = 0; q < P; q++) pairs.push([`${j},${q}`, `(${p}, ${q})`, place < 0]);
  });
  let pair = element("pair").value || "all";
  if (!pairs.some(([value, , off]) => value === pair && !off)) pair = "all";
  fill(element("pair"), pairs, pair);
  const [j, q] = pair === "all" ? [layer.queries.length - 1, P - 1] : pair.split(",").map(Number);
  const each = layer.queries.length * P;
  const maps = [
    weights(bytes, pair === "all" ? h : 2 * layer.heads + place * each + j * P + q),
    weights(bytes, layer.heads + h),
  ];
  const asked = Number(element("token").value), where = pair === "all" ? "" : `, pair (${layer.queries[j]}, ${q})`;
  element("note").textContent = place < 0
    ? "This page keeps the single pairs of the heads that moved furthest from their start; this head is none of them."
    : pair === "all" ? "" : "The pairs of one pseudo-query share one softmax, so one pair's weights sum to less than one.";
  maps.forEach((map, i) => {
    const z = rows(map.map(Math.sqrt), N, N), tops = best(map.subarray(asked * N, (asked + 1) * N), 8);
    draw(`heat-${i}`, about.figures.heat,
      { x: labels, y: labels, z, customdata: rows(map, N, N), colorscale: about.colours[dark.matches ? "dark" : "light"][0] }, axis);
    const said = tops.slice(0, 3).map(([w, s]) => `${label(s)} ${w.toFixed(3)}`).join("; ") || "nothing";
    element(`heat-${i}`).setAttribute("aria-label",
      `${about.names[i]}, ${layer.name}, head ${h}${i ? "" : where}. Token ${label(asked)} reads: ${said}. The table has more.`);
    element(`title-${i}`).textContent = `${about.names[i]}: head ${h}${i ? "" : where}`;
    element(`reads-${i}`).replaceChildren(...tops.map(([w, s]) => {
      const row = document.createElement("tr");
      for (const cell of [label(s), w.toFixed(3)]) row.appendChild(document.createElement("td")).textContent = cell;
      return row;
    }));
  });
  let offset = (2 * layer.heads + layer.kept.length * each) * size;
  element("mixing").hidden = !layer.mixing;
  for (const [i, [count, n, m]] of (layer.mixing || []).entries()) {
    const values = new Float32Array(buffer.slice(offset, offset + 4 * count * n * m));
    const at = Math.min(i === 1 || i === 2 ? q : j, count - 1), limit = Math.max(...values.map(Math.abs), 1e-6);
    draw(`mixing-${i}`, about.figures.mixing, { z: rows(values.subarray(at * n * m, (at + 1) * n * m), n, m),
      zmin: -limit, zmax: limit, colorscale: about.colours[dark.matches ? "dark" : "light"][1] }, {});
    offset += 4 * count * n * m;
  }
  element("pseudo").textContent = `pseudo-query ${layer.queries[j]}, pseudo-key ${q}`;
  document.body.dataset.ready = `${l} ${h} ${pair} ${asked} ${dark.matches ? "dark" : "light"}`;
}

(async () => {
  const script = document.createElement("script");
  script.textContent = new TextDecoder().decode(await unpack("library"));
  document.head.append(script);
  fill(element("layer"), about.layers.map((layer, i) => [String(i), layer.name]), String(about.start[0]));
  fill(element("token"), about.tokens.map((_, n) => [String(n), label(n)]), String(N - 1));
  for (const id of ["layer", "head", "pair", "token"]) element(id).addEventListener("change", show);
  dark.addEventListener("change", show);
  await show();
  for (const id of ["heat-0", "heat-1"]) {
    element(id).on("plotly_click", ({ points }) => { element("token").value = String(labels.indexOf(points[0].y)); show(); });
  }
})();
