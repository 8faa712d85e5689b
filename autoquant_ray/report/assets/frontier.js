// The chart "Loss against size": BokehJS draws the points that the page carries as JSON.
{
  const place = document.getElementById("frontier");
  const { points, legend, label, across: ends, loss, bits_at: bitsAt } =
    JSON.parse(document.getElementById("frontier-data").textContent);
  // In the order in which they are drawn: a ring around a star is seen, a star on a ring hides it.
  // Each kind has its own shape; colours are the names of the page's variables.
  const KINDS = {
    curve: { marker: "circle", size: 6, fill: "good", line: "good", line_width: 1 },
    uniform: { marker: "square", size: 9, fill: "panel", line: "look", line_width: 2 },
    knee: { marker: "diamond", size: 16, fill: "panel", line: "good", line_width: 2.5 },
    solution: { marker: "star", size: 20, fill: "ink", line: "panel", line_width: 1 },
    measured: { marker: "circle", size: 17, fill: null, line: "bad", line_width: 2.5 },
  };
  const kinds = Object.keys(KINDS).filter((kind) => points.kind.includes(kind));
  const indices = points.kind.map((_, i) => i);
  const rows = (isTaken) => Object.fromEntries(Object.entries(points).map(
    ([name, column]) => [name, column.filter((_, i) => isTaken(i))]));
  const isCurve = (i) => ["curve", "knee"].includes(points.kind[i]);
  Bokeh.logger.set_level("warn");

  // --- Axes

  const short = (value) => {
    const number = Number(value.toPrecision(3));
    return number < 1e-3 ? number.toExponential() : `${number}`;
  };
  class NumberFormatter extends Bokeh.TickFormatter {
    static __name__ = "NumberFormatter";
    doFormat(ticks) {
      return ticks.map(short);
    }
  }
  // Bits along the curve, whose points lie at known sizes; null beyond it.
  const between = (value, from, to) => {
    const next = from.findIndex((other) => other >= value);
    if (next < 0 || value < from[0]) return null;
    if (next === 0) return to[0];
    const share = (value - from[next - 1]) / (from[next] - from[next - 1]);
    return to[next - 1] + (to[next] - to[next - 1]) * share;
  };
  const isThere = (value) => value !== null;
  class BitsTicker extends Bokeh.BasicTicker {
    static __name__ = "BitsTicker";
    get_ticks_no_defaults(low, high, cross, most) {
      const { x, bits } = bitsAt;
      const [first, last] = [Math.max(low, x[0]), Math.min(high, x.at(-1))];
      if (first >= last) return { major: [], minor: [] };
      const inside = [first, last].map((place) => between(place, x, bits));
      const { major } = super.get_ticks_no_defaults(...inside, cross, most);
      return { major: major.map((tick) => between(tick, bits, x)).filter(isThere), minor: [] };
    }
  }
  class BitsFormatter extends Bokeh.TickFormatter {
    static __name__ = "BitsFormatter";
    doFormat(ticks) {
      return ticks.map((tick) => short(between(tick, bitsAt.x, bitsAt.bits) ?? NaN));
    }
  }
  class LossTicker extends Bokeh.LogTicker {
    static __name__ = "LossTicker";
    get_ticks_no_defaults(low, high, cross, most) {
      const inside = (steps) => {
        const major = [];
        for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
          major.push(...steps.map((step) => Number(`${step}e${power}`)));
        }
        return major.filter((value) => low <= value && value <= high);
      };
      const major = [[1, 2, 5], [1, 3], [1]].map(inside).find((ticks) => ticks.length <= most);
      return major?.length > 2 ? { major, minor: [] }
        : super.get_ticks_no_defaults(low, high, cross, most);
    }
  }

  // --- The figure

  const boxZoom = new Bokeh.BoxZoomTool();
  const plot = Bokeh.Plotting.figure({
    x_range: ends, y_range: loss, y_axis_type: "log", sizing_mode: "stretch_width", height: 370,
    output_backend: "svg", toolbar_inner: true,
    tools: [boxZoom, new Bokeh.PanTool(), new Bokeh.WheelZoomTool(), new Bokeh.ResetTool()],
    active_drag: matchMedia("(pointer: coarse)").matches ? null : boxZoom, active_scroll: null,
    background_fill_color: null, border_fill_color: null, outline_line_color: null,
    x_axis_label: label, y_axis_label: "loss, nats per token",
  });
  plot.toolbar.setv({ logo: null, autohide: true, stylesheets: [`
    :host(.bk-inner) { background: none; height: max-content; opacity: 1; }
    @media print { :host { display: none; } }`] });
  const lossTicker = new LossTicker();
  plot.yaxis.ticker = lossTicker;
  plot.yaxis.formatter = new NumberFormatter();
  const acrossTicker = plot.xaxes[0].ticker;
  plot.xaxes[0].formatter = new NumberFormatter();
  const bitsTicker = new BitsTicker();
  if (bitsAt) {
    plot.add_layout(new Bokeh.LinearAxis({
      axis_label: bitsAt.label, formatter: new BitsFormatter(), ticker: bitsTicker,
      major_label_policy: new Bokeh.NoOverlap(),
    }), "above");
  }
  const font = getComputedStyle(place).fontFamily;
  plot.axis.major_label_text_font = plot.axis.axis_label_text_font = font;
  plot.axis.major_label_text_font_size = plot.axis.axis_label_text_font_size = "12px";
  plot.axis.axis_label_text_font_style = "normal";
  plot.axis.minor_tick_line_color = null;

  const source = new Bokeh.ColumnDataSource({ data: points, name: "points" });
  const at = { x: { field: "x" }, y: { field: "loss" } };
  const only = (isTaken) => new Bokeh.CDSView({
    filter: new Bokeh.BooleanFilter({ booleans: indices.map(isTaken) }) });
  const curve = plot.line({
    ...at, source: new Bokeh.ColumnDataSource({ data: rows(isCurve) }), line_width: 2 });
  const colour = { field: "colour" }; // of error bars, whose ends follow their data alone
  const bars = {}, marks = {};
  for (const kind of kinds) {
    const { marker, size, line_width } = KINDS[kind];
    const isOne = (i) => points.kind[i] === kind;
    if (["solution", "measured"].includes(kind)) {
      bars[kind] = new Bokeh.Whisker({
        base: { field: "x" }, lower: { field: "low" }, upper: { field: "high" },
        source: new Bokeh.ColumnDataSource({ data: rows(isOne) }), name: `${kind} errors`,
        level: "glyph", line_width: 2,
        line_color: colour,
        lower_head: new Bokeh.TeeHead({ size: 8, line_width: 2, line_color: colour }),
        upper_head: new Bokeh.TeeHead({ size: 8, line_width: 2, line_color: colour }),
      });
      plot.add_layout(bars[kind]);
    }
    marks[kind] = plot.scatter({
      ...at, source, view: only(isOne), name: kind, marker, size, line_width,
    });
  }
  const pointed = plot.scatter({
    ...at, source, view: only(() => true), size: 16, fill_color: null, line_color: null });
  plot.add_tools(new Bokeh.HoverTool({
    renderers: [pointed], limit: 4, visible: false,
    tooltips: "<p style='margin: 2px 0 4px'><b>@name</b><br>@loss_text<br>"
      + "@bits_text bits, @size_text</p>",
  }));
  for (const renderer of plot.renderers) renderer.hover_glyph = null;
  const names = new Bokeh.LabelSet({
    name: "names",
    source: new Bokeh.ColumnDataSource({ data: {} }), text_font: font, text_font_size: "12px",
    x_offset: { field: "right" }, y_offset: { field: "up" }, text_align: { field: "align" },
    text_font_style: { field: "style" }, text_baseline: "middle",
  });
  plot.add_layout(names);
  // Squares by number, left to right, where not all of their names have room; the names are below.
  const squares = indices.filter((i) => points.kind[i] === "uniform")
    .sort((i, k) => points.x[i] - points.x[k] || points.loss[i] - points.loss[k]);
  const numbers = indices.map((i) => `${squares.indexOf(i) + 1}`);
  const keyOfSquares = document.getElementById("frontier-squares");
  keyOfSquares.textContent = "One format everywhere, left to right: "
    + `${squares.map((i) => `${numbers[i]}\u00a0${points.name[i].replace(/^all /, "")}`).join(", ")}.`;
  const keys = new Bokeh.Legend({
    items: legend.map(([kind, text]) => new Bokeh.LegendItem({
      label: text, renderers: kind === "curve" ? [curve, marks[kind]] : [marks[kind]] })),
    orientation: "horizontal", location: "left", click_policy: "hide", border_line_color: null,
    background_fill_color: null, label_text_font: font, label_text_font_size: "13px",
    glyph_width: 34, glyph_height: 34, label_standoff: 6, margin: 0, padding: 0,
    stylesheets: [`
      .bk-grid { display: flex; flex-wrap: wrap; gap: 0 10px; padding-top: 8px; width: auto; }
      .bk-label { white-space: normal; }
      .bk-item svg { height: 34px; margin: -4px 0; width: 34px; }`], // unsized: 300 x 150 each
  });
  plot.add_layout(keys, "below");

  // --- What changes with the window, the view and the kinds that are shown

  const pen = document.createElement("canvas").getContext("2d");
  const overlap = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];
  const around = (x, y, room) => [x - room, y - room, x + room, y + room];
  const BESIDE = [[11, 0, "left"], [8, 14, "left"], [-11, 0, "right"], [0, 16, "center"],
    [-8, -14, "right"], [0, -17, "center"]];
  // A text at the first free place beside its point; null where there is none.
  const textAt = (i, text, spot, taken) => {
    const style = points.kind[i] === "solution" ? "bold" : "normal";
    pen.font = `${style} 12px ${font}`;
    const wide = pen.measureText(text).width;
    for (const [right, up, align] of BESIDE) {
      const [x, y] = [spot[0] + right, spot[1] - up];
      const left = { left: x, center: x - wide / 2, right: x - wide }[align];
      const box = [left, y - 7, left + wide, y + 7];
      const isInside = box[0] >= 0 && box[2] <= plot.inner_width
        && box[1] >= 0 && box[3] <= plot.inner_height;
      if (isInside && !taken.some((other) => overlap(box, other))) {
        return { box, x: points.x[i], y: points.loss[i], text, right, up, align, style };
      }
    }
    return null;
  };
  const textsAt = (named, texts, spots, taken) => named.reduce((placed, i) => {
    const text = textAt(i, texts[i], spots[i], [...taken, ...placed.map(({ box }) => box)]);
    return text ? [...placed, text] : placed;
  }, []);
  const placeNames = () => {
    const { x_range, y_range, inner_width: width, inner_height: height } = plot;
    const across = (value) => (value - x_range.start) / (x_range.end - x_range.start) * width;
    const down = (value) =>
      Math.log(y_range.end / value) / Math.log(y_range.end / y_range.start) * height;
    const spots = indices.map((i) => [across(points.x[i]), down(points.loss[i])]);
    const shown = indices.filter((i) => marks[points.kind[i]].visible);
    const taken = shown.map((i) => around(...spots[i], isCurve(i) ? 3 : 6));
    const line = curve.visible ? spots.filter((_, i) => isCurve(i)) : [];
    line.slice(1).forEach(([toX, toY], n) => {
      const [x, y] = line[n];
      const steps = Math.ceil(Math.hypot(toX - x, toY - y) / 5);
      for (let k = 0; k < Math.min(steps, 500); k++) {
        taken.push(around(x + (toX - x) * k / steps, y + (toY - y) * k / steps, 2));
      }
    });
    const seen = shown.filter((i) => overlap(around(...spots[i], 0.5), [0, 0, width, height]));
    const ofKind = (kind) => seen.filter((i) => points.kind[i] === kind);
    const placed = textsAt([...ofKind("solution"), ...ofKind("knee")], points.name, spots, taken);
    taken.push(...placed.map(({ box }) => box));
    const uniform = ofKind("uniform");
    const named = textsAt(uniform, points.name, spots, taken);
    const isNamed = named.length === uniform.length;
    placed.push(...(isNamed ? named : textsAt(uniform, numbers, spots, taken)));
    keyOfSquares.hidden = isNamed;
    names.source.data = Object.fromEntries(["x", "y", "text", "right", "up", "align", "style"].map(
      (name) => [name, placed.map((text) => text[name])]));
  };
  const narrow = matchMedia("(max-width: 34rem)");
  const fit = () => {
    acrossTicker.desired_num_ticks = bitsTicker.desired_num_ticks = narrow.matches ? 5 : 10;
    lossTicker.desired_num_ticks = narrow.matches ? 10 : 16;
    plot.height = narrow.matches ? 470 : 370; // the legend takes more of it
  };
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const paint = () => {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => name && style.getPropertyValue(`--${name}`).trim();
    const [soft, ink] = [colour("soft"), colour("ink")];
    plot.axis.axis_line_color = plot.axis.major_tick_line_color = soft;
    plot.axis.major_label_text_color = plot.axis.axis_label_text_color = soft;
    plot.grid.grid_line_color = colour("line");
    curve.glyph.line_color = colour("good");
    for (const kind of kinds) {
      const [fill, line] = [colour(KINDS[kind].fill), colour(KINDS[kind].line)];
      marks[kind].glyph.setv({ fill_color: fill, line_color: line });
      if (kind in bars) {
        const { data } = bars[kind].source;
        bars[kind].source.data = { ...data, colour: data.kind.map(() => fill ?? line) };
      }
    }
    names.text_color = ink;
    keys.label_text_color = soft;
    keys.inactive_fill_color = colour("panel");
  };
  for (const kind of kinds) {
    marks[kind].properties.visible.change.connect(() => {
      if (kind in bars) bars[kind].visible = marks[kind].visible;
      pointed.view = only((i) => marks[points.kind[i]].visible);
      placeNames();
    });
  }
  for (const changed of [plot.properties.inner_width.change, plot.properties.inner_height.change,
    plot.x_range.change, plot.y_range.change]) changed.connect(placeNames);
  narrow.addEventListener("change", fit);
  dark.addEventListener("change", paint);
  // Paper is white, and may be narrower than the window.
  addEventListener("beforeprint", () => {
    place.style.zoom = Math.min(1, 900 / place.clientWidth);
    place.style.filter = dark.matches ? "invert(1) hue-rotate(180deg)" : "none";
  });
  addEventListener("afterprint", () => place.removeAttribute("style"));
  place.hidden = false;
  document.getElementById("frontier-missing").hidden = true;
  // What the chart shows is said below it, and in words beside its numbers.
  document.getElementById("frontier-numbers").append(document.getElementById("frontier-summary"));
  fit();
  paint();
  Bokeh.Plotting.show(plot, place);
}
