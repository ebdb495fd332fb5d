"use strict";
// Brings a report to life: uPlot draws lines over the pictures that are there without scripts, other pictures tell their
// values on hover, series and seeds can be switched off, tables sort, values and pictures are saved.
(() => {
  const root = document.documentElement, hidden = { series: new Set(), seeds: new Set() }, figures = [];
  let lit = null; // the series that is highlighted in all figures

  const make = (tag, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };
  const button = (text, title, act, pressed) => {
    const made = make("button", { type: "button", textContent: text, title });
    if (pressed !== undefined) made.setAttribute("aria-pressed", pressed);
    made.addEventListener("click", () => act(made));
    return made;
  };
  const color = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();
  const number = (value) =>
    value === null ? "–" : value.toLocaleString("en", { maximumSignificantDigits: 4, useGrouping: value >= 1e4 });
  const shown = (data, value) => (data.percent && value !== null ? `${number(100 * value)} %` : number(value));
  const seriesOf = (data, curve) => String(curve.of[data.series]);
  const panelOf = (data, curve) => (data.panel === null ? "" : String(curve.of[data.panel]));
  const isChosen = (data, curve) => data.seed === null || !hidden.seeds.has(curve.of[data.seed]);

  // Lines of a panel: the mean over the chosen seeds and its band.
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const summary = (data, [values, spreads]) => {
    const isGeometric = data.geometric && values.every((value) => value > 0);
    const middle = isGeometric ? Math.exp(mean(values.map(Math.log))) : mean(values);
    if (data.band === "range") return [middle, Math.min(...values), Math.max(...values)];
    if (data.band === "std" && values.length < 2) return [middle, null, null];
    const squares = mean(values.map((value) => (value - middle) ** 2));
    const half = data.band === "spread" ? mean(spreads) : Math.sqrt((squares * values.length) / (values.length - 1));
    return [middle, middle - half, middle + half];
  };
  const linesOf = ({ data, log }, panel) => {
    const lines = new Map();
    for (const curve of data.curves) {
      const name = seriesOf(data, curve);
      if (panelOf(data, curve) !== panel || hidden.series.has(name) || !isChosen(data, curve)) continue;
      if (!lines.has(name)) lines.set(name, { curve, points: new Map() });
      const { points } = lines.get(name);
      curve.x.forEach((x, i) => {
        if (x === null || curve.y[i] === null) return;
        if (!points.has(x)) points.set(x, [[], []]);
        points.get(x)[0].push(curve.y[i]);
        points.get(x)[1].push(curve.spread?.[i] ?? 0);
      });
    }
    const names = [...lines.keys()], all = [...lines.values()];
    const xs = [...new Set(all.flatMap(({ points }) => [...points.keys()]))].sort((a, b) => a - b);
    const rows = all.flatMap(({ points }) => {
      const found = xs.map((x) => (points.has(x) ? summary(data, points.get(x)) : [null, null, null]));
      return [0, 1, 2].map((part) => found.map((values) => (log && values[part] <= 0 ? null : values[part])));
    });
    return { panel, names, curves: all.map(({ curve }) => curve), table: [xs, ...rows] };
  };

  // Charts.
  const axis = (extra) => ({
    stroke: color("soft"), font: "12px system-ui, sans-serif", labelFont: "12px system-ui, sans-serif", labelSize: 18,
    grid: { stroke: color("grid"), width: 1 }, ticks: { stroke: color("grid"), width: 1, size: 4 }, ...extra,
  });
  const round = (value, up) => {
    const power = 10 ** Math.floor(Math.log10(value)), steps = [1, 2, 5, 10].map((step) => step * power);
    return up ? steps.find((step) => step >= value * 0.999) : steps.findLast((step) => step <= value * 1.001);
  };
  const drawPanel = (figure, { panel, names, curves, table }, [low, high]) => {
    const { data, log } = figure, box = make("div", { className: "panel" });
    if (panel) box.append(make("strong", { textContent: panel }));
    figure.chart.append(box);
    const series = [{}], bands = [], edge = { stroke: "transparent", width: 0, points: { show: false } };
    curves.forEach((curve, i) => {
      const alpha = Math.round(255 * (curve.alpha ?? 1)).toString(16).padStart(2, "0");
      const line = { stroke: color(curve.color) + alpha, width: 2, dash: curve.dash, spanGaps: true };
      series.push({ ...line, points: { show: table[0].length < 13, size: 6 } }, { ...edge }, { ...edge });
      const isClear = curves.length < 9 && !(data.geometric && data.band === "std");
      if (isClear) bands.push({ series: [3 * i + 3, 3 * i + 2], fill: `${color(curve.color)}26` });
    });
    const whole = !data.logX && table[0].every(Number.isInteger) ? [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 1e5] : null;
    const name = (value) => (value === null ? "" : number(value));
    const plot = new uPlot({
      width: box.clientWidth, height: figure.panels.length > 1 ? 210 : 280, legend: { show: false }, series, bands,
      cursor: { points: { size: 8 }, drag: { x: true, y: false } },
      scales: {
        x: { time: false, distr: data.logX ? 3 : 1, range: (_, from, to) => (from < to ? [from, to] : [from * 0.9, to * 1.1 + 0.1]) },
        y: log ? { distr: 3, range: [round(low), round(high, true)] } : { range: uPlot.rangeNum(low, high, 0.1, true) },
      },
      axes: [
        axis({ label: data.x, size: 30, values: (_, ticks) => ticks.map(name), ...(whole && { incrs: whole }) }),
        axis({ size: 62, values: (_, ticks) => ticks.map((value) => (value === null ? "" : shown(data, value))) }),
      ],
      hooks: { setCursor: [(moved) => hover(figure, moved, names)] },
    }, table, box);
    figure.plots.push({ plot, names, box });
  };
  const draw = (figure) => {
    figure.plots.forEach(({ plot }) => plot.destroy());
    figure.plots = [];
    figure.chart.replaceChildren();
    const panels = figure.panels.map((panel) => linesOf(figure, panel)).filter(({ table }) => table[0].length);
    const values = panels.flatMap(({ table }) => table.slice(1).flat()).filter((value) => value !== null);
    const ends = values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
    panels.forEach((panel) => drawPanel(figure, panel, ends)); // all on one scale
    light(lit, true);
  };

  // What the pointer is at.
  const tip = make("div", { id: "tip", hidden: true, role: "status" });
  const tell = (head, rows = [], x = 0, y = 0) => {
    tip.hidden = head === null;
    if (tip.hidden) return light(null);
    tip.replaceChildren(make("strong", { textContent: head }));
    for (const [name, value, of] of rows) {
      const row = make("div", { className: name === lit ? "lit" : "" }, `${name} `, make("b", { textContent: value }));
      row.style.setProperty("--of", `var(--${of})`);
      tip.append(row);
    }
    tip.style.left = `${Math.max(4, Math.min(x + 14, root.clientWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${Math.max(4, Math.min(y + 14, innerHeight - tip.offsetHeight - 8))}px`;
  };
  const hover = ({ data, colors }, plot, names) => {
    const { idx, left, top } = plot.cursor;
    if (idx === null || idx === undefined || left < 0) return tell(null);
    const values = names.map((_, i) => plot.data[1 + 3 * i][idx]);
    const away = values.map((value) => (value === null ? Infinity : Math.abs(plot.valToPos(value, "y") - top)));
    const nearest = Math.min(...away);
    light(nearest < 40 ? names[away.indexOf(nearest)] : null);
    const { left: x, top: y } = plot.over.getBoundingClientRect();
    const rows = names.map((name, i) => [name, shown(data, values[i]), colors.get(name)]);
    tell(`${data.x} ${number(plot.data[0][idx])}`, rows, x + left, y + top);
  };
  const light = (name, again = false) => {
    if (name === lit && !again) return;
    lit = name;
    for (const { colors, plots, marks, legend } of figures) {
      const has = lit !== null && colors.has(lit);
      for (const { plot, names } of plots) {
        plot.series.forEach((series, i) => { series.alpha = !has || names[Math.floor((i - 1) / 3)] === lit ? 1 : 0.15; });
        plot.redraw(false);
      }
      for (const [mark, of] of marks) mark.classList.toggle("dim", (has && of !== lit) || hidden.series.has(of));
      for (const one of legend.children) one.classList.toggle("lit", one.textContent === lit);
    }
    for (const row of document.querySelectorAll("tbody tr")) {
      row.classList.toggle("lit", lit !== null && row.cells[0].textContent.trim() === lit);
    }
  };
  // Pictures that are not drawn anew: each mark stands for curves of the values.
  const wake = ({ element, data, marks, dots }) => {
    const labels = (curve) => curve.of.map((label, i) => (i === data.seed ? `seed ${label}` : label)).join(", ");
    for (const mark of element.querySelectorAll("svg [data-curves]")) {
      const curves = mark.dataset.curves.split(",").map((place) => data.curves[place]).filter(Boolean);
      if (!curves.length) continue;
      marks.push([mark, seriesOf(data, curves[0])]);
      const points = [...mark.querySelectorAll("use")], isEach = points.length === curves.length;
      for (const [target, of] of isEach ? points.map((point, i) => [point, [curves[i]]]) : [[mark, curves]]) {
        target.addEventListener("pointermove", (event) => {
          light(seriesOf(data, of[0]));
          const rows = of.map((curve) => [labels(curve), shown(data, curve.y[0]), curve.color]);
          tell(data.y, rows, event.clientX, event.clientY);
        });
        target.addEventListener("pointerleave", () => tell(null));
        if (isEach) dots.push([target, of[0]]);
      }
    }
    return marks.length;
  };
  const choose = (set, value) => {
    if (set && !set.delete(value)) set.add(value);
    for (const figure of figures) {
      for (const one of figure.legend.children) one.setAttribute("aria-pressed", !hidden.series.has(one.textContent));
      for (const [dot, curve] of figure.dots) dot.classList.toggle("gone", !isChosen(figure.data, curve));
      if (figure.chart) draw(figure);
    }
    light(lit, true);
  };

  // Saving.
  const save = (name, url) => make("a", { href: url, download: name }).click();
  const saveText = (name, text) => save(name, `data:text/plain;charset=utf-8,${encodeURIComponent(text)}`);
  const csv = ({ labels, x, y, curves }) => {
    const quoted = (value) => {
      const isFormula = typeof value === "string" && /^\s*[=+\-@]/.test(value); // to a spreadsheet
      return `"${`${isFormula ? "'" : ""}${value ?? ""}`.replaceAll('"', '""')}"`;
    };
    const rows = curves.flatMap((curve) => curve.y.map((value, i) => [...curve.of, ...(x ? [curve.x[i]] : []), value]));
    return [[...labels, ...(x ? [x] : []), y], ...rows].map((row) => `${row.map(quoted).join(",")}\r\n`).join("");
  };
  const png = async ({ element, svg, chart, colors, name }) => {
    const box = element.getBoundingClientRect(), canvas = make("canvas", { width: 2 * box.width, height: 2 * box.height });
    const pen = canvas.getContext("2d"), copy = svg.cloneNode(true);
    const place = (of) => { const at = of.getBoundingClientRect(); return [at.left - box.left, at.top - box.top, at.width, at.height]; };
    pen.scale(2, 2);
    pen.fillStyle = color("page");
    pen.fillRect(0, 0, box.width, box.height);
    pen.textBaseline = "top";
    for (const word of element.querySelectorAll("figcaption span, .chart strong, .legend [aria-pressed=true]")) {
      pen.font = `${getComputedStyle(word).fontWeight} 13px system-ui, sans-serif`;
      pen.fillStyle = color(colors.get(word.textContent) ?? "ink");
      pen.fillText(word.textContent, ...place(word).slice(0, 2));
    }
    for (const drawn of chart?.querySelectorAll("canvas") ?? []) pen.drawImage(drawn, ...place(drawn));
    if (!chart) {
      const [, , width, height] = place(svg);
      Object.entries({ width, height }).forEach((pair) => copy.setAttribute(...pair));
      copy.querySelectorAll(".dim, .gone").forEach((mark) => mark.setAttribute("opacity", mark.matches(".gone") ? 0 : 0.15));
      const text = new XMLSerializer().serializeToString(copy).replaceAll(/var\(--([a-z0-9]+)\)/g, (_, of) => color(of).replaceAll('"', "'"));
      const image = make("img", { src: `data:image/svg+xml,${encodeURIComponent(text)}` });
      await image.decode();
      pen.drawImage(image, ...place(svg));
    }
    save(`${name}.png`, canvas.toDataURL());
  };

  // The page.
  const prepare = (element) => {
    const data = JSON.parse(element.querySelector("script").textContent), svg = element.querySelector("svg.plot");
    const colors = new Map(), dashes = new Map();
    for (const curve of data.curves) {
      colors.set(seriesOf(data, curve), data.labels[data.panel] === "arm" ? "ink" : curve.color);
      dashes.set(seriesOf(data, curve), { 1: "dotted", 4: "dashed", 6: "double" }[curve.dash?.[0]] ?? "solid");
    }
    const figure = { element, data, svg, colors, log: data.logY, plots: [], marks: [], dots: [], name: element.id };
    figure.panels = [...new Set(data.curves.map((curve) => panelOf(data, curve)))];
    figure.legend = make("div", { className: data.x === null ? "legend" : "legend lines" });
    for (const [name, of] of colors) {
      const one = button(name, "Show or hide it in every picture", () => choose(hidden.series, name), true);
      one.style.setProperty("--of", `var(--${of})`);
      one.style.setProperty("--line", dashes.get(name));
      one.addEventListener("pointerenter", () => light(name));
      one.addEventListener("pointerleave", () => light(null));
      figure.legend.append(one);
    }
    const buttons = make("div", { className: "buttons" }), scale = () => (figure.log ? "Linear" : "Log");
    const isPositive = data.curves.every((curve) => curve.y.every((value) => value === null || value > 0));
    if (data.x !== null && isPositive && data.band !== "spread") {
      buttons.append(button(scale(), "Scale of the vertical axis", (one) => {
        figure.log = !figure.log;
        one.textContent = scale();
        draw(figure);
      }));
    }
    buttons.append(
      button("CSV", "Save the values as a table", () => saveText(`${figure.name}.csv`, csv(data))),
      button("JSON", "Save the values as JSON", () => saveText(`${figure.name}.json`, JSON.stringify(data, null, 1))),
      button("PNG", "Save the picture", () => png(figure)),
    );
    element.querySelector("figcaption").append(buttons);
    element.querySelector("figcaption").after(figure.legend);
    figures.push(figure);
    if (data.x === null) return wake(figure) || figure.legend.remove();
    figure.chart = make("div", { className: "chart" });
    svg.before(figure.chart);
    element.classList.add("alive");
    draw(figure);
    figure.chart.addEventListener("pointerleave", () => tell(null));
    const fit = () => figure.plots.forEach(({ plot, box }) => plot.setSize({ width: box.clientWidth, height: plot.height }));
    return new ResizeObserver(fit).observe(figure.chart);
  };
  const chooseSeeds = () => {
    const all = figures.flatMap(({ data }) => (data.seed === null ? [] : data.curves.map((curve) => curve.of[data.seed])));
    const seeds = [...new Set(all)].sort((a, b) => a - b);
    if (seeds.length < 2) return;
    const each = seeds.map((seed) => button(seed, "Show or hide this seed in every picture", (one) => {
      choose(hidden.seeds, seed);
      one.setAttribute("aria-pressed", !hidden.seeds.has(seed));
    }, true));
    const note = "Curves follow the choice; verdicts, tables and marks of means are of all seeds.";
    document.querySelector("header").after(make("div", { className: "seeds" }, "Seeds ", ...each, make("span", { textContent: note })));
  };
  const sortable = (table) => {
    const headings = [...table.tHead.rows[0].cells], body = table.tBodies[0];
    const key = (row, column) => {
      const text = row.cells[column].textContent.trim(), plain = text.replaceAll(",", "").replaceAll("−", "-");
      const found = column ? plain.match(/[-+]?\d+(\.\d+)?(e[-+]?\d+)?/) : null;
      return found ? [0, Number(found[0]), ""] : [1, 0, text];
    };
    const order = ([a, b, c], [d, e, f]) => a - d || b - e || c.localeCompare(f);
    headings.forEach((heading, column) => {
      const one = button("", "Sort by this column", () => {
        const sign = heading.ariaSort === "ascending" ? -1 : 1;
        headings.forEach((other) => other.removeAttribute("aria-sort"));
        heading.ariaSort = sign > 0 ? "ascending" : "descending";
        body.append(...[...body.rows].sort((a, b) => sign * order(key(a, column), key(b, column))));
      });
      one.className = "sort";
      one.append(...heading.childNodes);
      heading.append(one);
    });
  };

  document.body.append(tip);
  document.querySelectorAll("figure:has(> script)").forEach(prepare);
  chooseSeeds();
  document.querySelectorAll("table").forEach(sortable);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => choose());
})();
