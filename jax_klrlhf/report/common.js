'use strict';
// Elements and charts for this library's pages. Everything that a page shows comes in by textContent.
const klrlhf = (() => {
  const make = (tag, text, style) => {
    const element = document.createElement(tag);
    if (text !== undefined && text !== null) element.textContent = text;
    if (style) element.className = style;
    return element;
  };
  const SVG = 'http://www.w3.org/2000/svg';
  const draw = (tag, attributes, text) => {
    const element = document.createElementNS(SVG, tag);
    Object.entries(attributes || {}).forEach(([name, value]) => element.setAttribute(name, String(value)));
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const round = x => {
    if (x === null || x === undefined || !Number.isFinite(x)) return '';
    if (Number.isInteger(x)) return String(x);
    const size = Math.abs(x);
    return size >= 1000 ? x.toFixed(0) : size >= 0.01 ? x.toPrecision(3) : x.toExponential(1);
  };
  const COLOURS = ['#2166ac', '#e66101', '#1a9850', '#984ea3', '#8c6d31', '#d6604d', '#17becf', '#666666'];
  // At most six round numbers over a range.
  const ticks = (low, high) => {
    if (!(high > low)) return [low];
    const raw = (high - low) / 4, unit = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map(x => x * unit).find(x => x >= raw);
    const found = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) found.push(+(k * step).toPrecision(12));
    return found;
  };
  const good = x => x !== null && x !== undefined && Number.isFinite(x);
  // series: {name, x, y, error?, xError?, points?, line?, labels?}; errors are one standard error, drawn twice.
  const chart = ({ title, series, xLabel, yLabel, width = 420, height = 260 }) => {
    const kept = series.map(s => {
      const keep = s.x.map((x, k) => good(x) && good(s.y[k]) ? k : -1).filter(k => k >= 0);
      const at = list => list ? keep.map(k => list[k]) : null;
      return { ...s, x: at(s.x), y: at(s.y), error: at(s.error), xError: at(s.xError), labels: at(s.labels) };
    }).filter(s => s.x.length);
    const box = make('figure', undefined, 'chart');
    box.append(make('figcaption', title));
    if (!kept.length) {
      box.append(make('p', 'nothing yet', 'soft'));
      return box;
    }
    const spread = (values, errors) => values.flatMap((v, k) => errors && good(errors[k]) ? [v - 2 * errors[k], v + 2 * errors[k]] : [v]);
    const xs = kept.flatMap(s => spread(s.x, s.xError)), ys = kept.flatMap(s => spread(s.y, s.error));
    const range = values => {
      let low = values.reduce((a, b) => Math.min(a, b)), high = values.reduce((a, b) => Math.max(a, b));
      const pad = high > low ? 0.04 * (high - low) : 0.5 * Math.abs(low) || 0.5;
      return [low - pad, high + pad];
    };
    const [x0, x1] = range(xs), [y0, y1] = range(ys);
    const left = 52, right = 10, top = 8, bottom = 36;
    const px = x => left + (x - x0) / (x1 - x0) * (width - left - right);
    const py = y => height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom);
    const svg = draw('svg', { viewBox: `0 0 ${width} ${height}`, role: 'img', 'aria-label': title });
    ticks(y0, y1).forEach(y => {
      svg.append(draw('line', { x1: left, x2: width - right, y1: py(y), y2: py(y), class: 'grid' }));
      svg.append(draw('text', { x: left - 5, y: py(y) + 4, 'text-anchor': 'end' }, round(y)));
    });
    ticks(x0, x1).forEach(x => svg.append(draw('text', { x: px(x), y: height - bottom + 15, 'text-anchor': 'middle' }, round(x))));
    svg.append(draw('text', { x: (left + width - right) / 2, y: height - 4, 'text-anchor': 'middle' }, xLabel));
    if (yLabel) svg.append(draw('text', { x: 12, y: height / 2, 'text-anchor': 'middle', transform: `rotate(-90 12 ${height / 2})` }, yLabel));
    kept.forEach((s, number) => {
      const colour = COLOURS[(s.colour === undefined ? number : s.colour) % COLOURS.length];
      if (s.error && s.line !== false && s.x.length > 1) {
        const up = s.x.map((x, k) => `${px(x)},${py(s.y[k] + 2 * (s.error[k] || 0))}`);
        const down = s.x.map((x, k) => `${px(x)},${py(s.y[k] - 2 * (s.error[k] || 0))}`).reverse();
        svg.append(draw('polygon', { points: [...up, ...down].join(' '), fill: colour, 'fill-opacity': 0.15 }));
      }
      if (s.line !== false) svg.append(draw('polyline', { points: s.x.map((x, k) => `${px(x)},${py(s.y[k])}`).join(' '), fill: 'none', stroke: colour, 'stroke-width': 1.8 }));
      if (s.points || s.x.length === 1 || s.line === false) s.x.forEach((x, k) => {
        const e = s.error && s.error[k], f = s.xError && s.xError[k];
        if (good(e)) svg.append(draw('line', { x1: px(x), x2: px(x), y1: py(s.y[k] - 2 * e), y2: py(s.y[k] + 2 * e), stroke: colour }));
        if (good(f)) svg.append(draw('line', { x1: px(x - 2 * f), x2: px(x + 2 * f), y1: py(s.y[k]), y2: py(s.y[k]), stroke: colour }));
        const dot = draw('circle', { cx: px(x), cy: py(s.y[k]), r: 3.2, fill: colour });
        dot.append(draw('title', {}, `${s.labels ? s.labels[k] + ': ' : ''}${round(x)}, ${round(s.y[k])}`));
        svg.append(dot);
        if (s.labels) svg.append(draw('text', { x: px(x) + 6, y: py(s.y[k]) - 5 }, s.labels[k]));
      });
    });
    box.append(svg);
    if (kept.length > 1) {
      const names = make('div', undefined, 'names');
      kept.forEach((s, number) => {
        const name = make('span', s.name);
        name.style.borderColor = COLOURS[(s.colour === undefined ? number : s.colour) % COLOURS.length];
        names.append(name);
      });
      box.append(names);
    }
    return box;
  };
  const table = (head, rows) => {
    const around = make('div', undefined, 'scroll'), found = make('table');
    const fill = (cells, tag) => {
      const row = make('tr');
      cells.forEach(cell => row.append(make(tag, typeof cell === 'number' ? round(cell) : cell)));
      found.append(row);
    };
    fill(head, 'th');
    rows.forEach(cells => fill(cells, 'td'));
    around.append(found);
    return around;
  };
  return { make, chart, table, round };
})();
