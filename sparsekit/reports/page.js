"use strict";
// The page is whole without this script; it switches runs on and off, chooses axes and theme, tells the values under
// the pointer and saves pictures. Data of a plot stand beside it as JSON and are read when they are first asked for.
(() => {
  const root = document.documentElement;
  root.classList.add("js");
  root.dataset.curves = "tokens";
  root.dataset.layers = "layer";
  const hidden = new Set();
  const read = new WeakMap();
  const tip = document.getElementById("tip");
  const press = (button, on) => button.setAttribute("aria-pressed", String(on));

  // ---- runs on and off

  let members = null;
  function membersOf(group) {
    if (!members) {
      members = new Map();
      for (const element of document.querySelectorAll("main [data-group]")) {
        const name = element.dataset.group;
        if (!members.has(name)) members.set(name, []);
        members.get(name).push(element);
      }
    }
    return members.get(group) || [];
  }
  function show(group, on) {
    if (on) hidden.delete(group);
    else hidden.add(group);
    for (const element of membersOf(group)) element.classList.toggle("off", !on);
    for (const chip of chips) if (chip.dataset.switch === group) press(chip, on);
  }
  const chips = [...document.querySelectorAll("[data-switch]")];
  for (const chip of chips) {
    chip.title = "switch on and off; twice in a row: this one alone";
    chip.addEventListener("click", () => show(chip.dataset.switch, hidden.has(chip.dataset.switch)));
    chip.addEventListener("dblclick", () => chips.forEach((other) => show(other.dataset.switch, other === chip)));
  }
  for (const button of document.querySelectorAll("[data-all]")) {
    button.addEventListener("click", () => chips.forEach((chip) => show(chip.dataset.switch, button.dataset.all === "true")));
  }

  // ---- axes and theme

  function choose(buttons, chosen, apply) {
    for (const button of buttons) {
      button.addEventListener("click", () => {
        buttons.forEach((other) => press(other, other === button));
        apply(button);
      });
    }
  }
  const choices = [...document.querySelectorAll("[data-choice]")];
  for (const name of new Set(choices.map((button) => button.dataset.choice))) {
    const which = name.startsWith("curves") ? "curves" : "layers";
    choose(choices.filter((b) => b.dataset.choice === name), null, (b) => { root.dataset[which] = b.dataset.value; });
  }
  choose([...document.querySelectorAll("[data-theme-choice]")], null, (button) => {
    if (button.dataset.themeChoice === "system") delete root.dataset.theme;
    else root.dataset.theme = button.dataset.themeChoice;
  });

  // ---- values under the pointer

  const written = (value) => {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e12)) return value.toExponential(3).replace("e+", "e");
    const notation = size >= 1e9 ? "compact" : "standard";
    return value.toLocaleString("en", { maximumSignificantDigits: 5, notation });
  };
  const at = (place, low, high, [begin, end, log]) => {
    const share = (place - low) / (high - low);
    return log ? begin * Math.pow(end / begin, share) : begin + share * (end - begin);
  };
  const to = (value, low, high, [begin, end, log]) => {
    const share = log ? Math.log(value / begin) / Math.log(end / begin) : (value - begin) / (end - begin);
    return low + share * (high - low);
  };
  function nearest(sorted, value) {
    let best = 0;
    for (let i = 1; i < sorted.length; i += 1) {
      if (Math.abs(sorted[i] - value) < Math.abs(sorted[best] - value)) best = i;
    }
    return best;
  }
  function dataOf(svg) {
    if (!read.has(svg)) read.set(svg, JSON.parse(svg.parentElement.querySelector("script").textContent));
    const data = read.get(svg);
    // over another axis a figure shows the same values, which stand with its first picture only
    if (data.kind === "lines" && !data.series) data.series = dataOf(svg.closest("figure").querySelector("svg.plot")).series;
    return data;
  }
  const colourOf = (svg, group) => {
    const line = [...svg.querySelectorAll("g.series")].find((g) => g.dataset.group === group);
    const drawn = line && line.querySelector("[style*=stroke], [style*=fill]");
    return drawn ? drawn.style.stroke || drawn.style.fill : "currentColor";
  };
  function crosshair(svg, x, box) {
    let line = svg.querySelector(".cross");
    if (!line) {
      line = document.createElementNS("http://www.w3.org/2000/svg", "line");
      line.setAttribute("class", "cross");
      line.setAttribute("stroke", "currentColor");
      line.setAttribute("stroke-opacity", "0.4");
      svg.append(line);
    }
    for (const [name, value] of [["x1", x], ["x2", x], ["y1", box[1]], ["y2", box[3]]]) line.setAttribute(name, value);
  }
  function say(head, rows, event) {
    const title = document.createElement("b");
    title.textContent = head;
    tip.replaceChildren(title, ...rows.map(([colour, label, value]) => {
      const row = document.createElement("div");
      const dot = document.createElement("i");
      dot.style.cssText = `width:.6rem;height:.6rem;border-radius:50%;flex:none;background:${colour}`;
      const name = document.createElement("span");
      name.textContent = label;
      const number = document.createElement("span");
      number.textContent = value;
      row.append(...(colour ? [dot] : []), name, number);
      return row;
    }));
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 6))}px`;
    tip.style.top = `${event.clientY + 18 + height > innerHeight ? event.clientY - height - 12 : event.clientY + 18}px`;
  }
  function tellLines(svg, data, x, y, event) {
    const [left, top, right, bottom] = data.box;
    const wanted = at(x, left, right, data.x);
    const found = [];
    for (const [place, series] of data.series.entries()) {
      if (hidden.has(series.group)) continue;
      const xs = data.xs[data.at[place]];
      const i = nearest(data.x[2] ? xs.map(Math.log) : xs, data.x[2] ? Math.log(wanted) : wanted);
      if (series.y[i] === null || series.y[i] === undefined) continue;
      const between = series.low ? ` [${written(series.low[i])}, ${written(series.high[i])}]` : "";
      found.push({ series, x: xs[i], y: series.y[i], text: written(series.y[i]) + between, far: Math.abs(to(series.y[i], bottom, top, data.y) - y) });
    }
    if (!found.length) return quiet();
    const close = found.reduce((a, b) => (Math.abs(b.x - wanted) < Math.abs(a.x - wanted) ? b : a));
    crosshair(svg, to(close.x, left, right, data.x), data.box);
    const told = found.sort((a, b) => a.far - b.far).slice(0, 9).sort((a, b) => b.y - a.y);
    const more = found.length - told.length;
    const rows = told.map((f) => [colourOf(svg, f.series.group), f.series.label, f.text]);
    if (more) rows.push(["", `and ${more} more`, ""]);
    say(`${data.names[0]} ${data.ticks[close.x] || written(close.x)}`, rows, event);
  }
  function tellMap(svg, data, x, y, event) {
    const [left, top, right, bottom] = data.box;
    if (x < left || x > right || y < top || y > bottom) return quiet();
    const [rows, columns] = data.shape;
    const row = Math.min(rows - 1, Math.floor(((y - top) / (bottom - top)) * rows));
    const column = Math.min(columns - 1, Math.floor(((x - left) / (right - left)) * columns));
    const value = data.rows ? written(data.rows[row][column]) : "";
    const named = (ticks, i) => (ticks && ticks[i] !== undefined ? ticks[i] : i);
    const place = `${data.names[1]} ${named(data.down, row)}, ${data.names[0]} ${named(data.across, column)}`;
    return say(place, value ? [["", "", value]] : [], event);
  }
  let told = null;
  function quiet() {
    tip.hidden = true;
    if (told) told.querySelector(".cross")?.remove();
    told = null;
  }
  function look(event) {
    const svg = event.target instanceof Element ? event.target.closest("svg.plot") : null;
    if (told && told !== svg) quiet();
    if (!svg) return;
    told = svg;
    const data = dataOf(svg);
    const frame = svg.getBoundingClientRect();
    const scale = svg.viewBox.baseVal.width / frame.width;
    const x = (event.clientX - frame.left) * scale;
    const y = (event.clientY - frame.top) * scale;
    (data.kind === "map" ? tellMap : tellLines)(svg, data, x, y, event);
  }
  document.addEventListener("pointermove", look);
  document.addEventListener("pointerdown", look);
  document.addEventListener("scroll", quiet, { passive: true });

  // ---- pictures as files, with the colours that they have on the page

  function standalone(svg, title) {
    const copy = svg.cloneNode(true);
    const [width, height, head] = [svg.viewBox.baseVal.width, svg.viewBox.baseVal.height, 20];
    copy.querySelectorAll(".off, .cross").forEach((element) => element.remove());
    copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
    copy.setAttribute("viewBox", `0 ${-head} ${width} ${height + head}`);
    copy.setAttribute("width", width);
    copy.setAttribute("height", height + head);
    const style = getComputedStyle(svg);
    copy.setAttribute("style", `color: ${style.color}; font-family: sans-serif; stroke-linejoin: round`);
    const paper = document.createElementNS(copy.namespaceURI, "rect");
    for (const [name, value] of [["y", -head], ["width", width], ["height", height + head], ["fill", getComputedStyle(document.body).backgroundColor]]) paper.setAttribute(name, value);
    const text = document.createElementNS(copy.namespaceURI, "text");
    for (const [name, value] of [["x", width / 2], ["y", -6], ["text-anchor", "middle"], ["font-size", 12], ["fill", style.color]]) text.setAttribute(name, value);
    text.textContent = title;
    copy.prepend(paper, text);
    return new XMLSerializer().serializeToString(copy);
  }
  function save(blob, name) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }
  function savePng(text, name) {
    const image = new Image();
    image.onload = () => {
      const canvas = document.createElement("canvas");
      [canvas.width, canvas.height] = [image.width * 3, image.height * 3];
      canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
      canvas.toBlob((blob) => save(blob, name));
    };
    image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(text)}`;
  }
  for (const variant of document.querySelectorAll(".variant")) {
    const buttons = document.createElement("div");
    buttons.className = "save";
    for (const kind of ["PNG", "SVG"]) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = kind;
      button.setAttribute("aria-label", `save as ${kind}`);
      button.addEventListener("click", () => {
        const svg = variant.querySelector("svg.plot");
        const text = standalone(svg, svg.getAttribute("aria-label"));
        if (kind === "PNG") savePng(text, `${variant.dataset.name}.png`);
        else save(new Blob([text], { type: "image/svg+xml" }), `${variant.dataset.name}.svg`);
      });
      buttons.append(button);
    }
    variant.append(buttons);
  }
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((each) => { each.open = true; }));
})();
