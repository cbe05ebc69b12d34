// Curves over steps, drawn by uPlot in the page's colours; what pages with curves share.
const lineColour = (i, n) =>
  `hsl(${((i * 360) / Math.max(n, 1) + 210) % 360} ${i % 2 ? 55 : 70}% ${dark.matches ? 64 : 42}%)`;
const figure = value =>
  typeof value !== 'number' ? '' : Math.abs(value) >= 1000 ? Math.round(value).toLocaleString('en')
    : value !== 0 && Math.abs(value) < 0.01 ? value.toExponential(2) : value.toFixed(value % 1 === 0 ? 0 : 4);
const duration = seconds => {
  const s = Math.round(seconds);
  if (s < 60) return `${s} s`;
  return s < 3600 ? `${Math.floor(s / 60)} min ${s % 60} s` : `${Math.floor(s / 3600)} h ${Math.round((s % 3600) / 60)} min`;
};
const bytes = n => (n >= 2 ** 30 ? `${(n / 2 ** 30).toFixed(2)} GiB` : `${(n / 2 ** 20).toFixed(1)} MiB`);

/// A table of heads and rows; cells that are numbers or Nodes as they are.
function tableOf(heads, rows) {
  const cell = value =>
    value instanceof Node ? make('td', { className: 'number' }, value)
      : make('td', { className: typeof value === 'number' ? 'number' : 'words',
                     textContent: typeof value === 'number' ? figure(value) : value ?? '' });
  return make('table', {}, make('tr', {}, ...heads.map(h => make('th', { textContent: h }))),
    ...rows.map(row => make('tr', {}, make('th', { className: 'row', textContent: row[0], title: row[0] }),
      ...row.slice(1).map(cell))));
}

const drawn = [];
const whole = [1, 2, 5].flatMap(d => [...Array(9).keys()].map(p => d * 10 ** p)).sort((a, b) => a - b);  // of steps
/// One plot: series are {label, points: [[step, value], ...], low?, high?}; with low and high (as points) a band.
function plot(into, title, series, x = 'step') {
  const shown = series.filter(s => s.points.length > 0);
  if (shown.length === 0) return;
  const place = make('div', {});
  el(into).append(place);
  const draw = () => {
    const width = Math.max(220, place.clientWidth);
    const columns = shown.flatMap(s => (s.low ? [s.points, s.low, s.high] : [s.points]));
    const data = uPlot.join(columns.map(points => [points.map(p => p[0]), points.map(p => p[1])]));
    const lines = [{ label: x }];
    const bands = [];
    shown.forEach((s, i) => {
      const stroke = lineColour(i, shown.length);
      const few = s.points.length < 40;
      lines.push({ label: s.label, stroke, width: 2, spanGaps: true, points: { show: few, size: 5 },
                   value: (_, v) => (v == null ? '\u2013' : figure(v)) });
      if (!s.low) return;
      const edge = { stroke: 'transparent', spanGaps: true, points: { show: false } };
      lines.push({ label: '', ...edge }, { label: '', ...edge });
      bands.push({ series: [lines.length - 1, lines.length - 2], fill: stroke.replace(')', ' / 0.18)') });
    });
    const axis = { stroke: variable('--soft'), grid: { stroke: variable('--line'), width: 1 },
                   ticks: { stroke: variable('--line'), width: 1 }, font: '12px system-ui, sans-serif' };
    const wide = { ...axis, size: 62, values: (_, ticks) => ticks.map(v => (v == null ? '' : tick(v))) };
    place.replaceChildren(make('h3', { textContent: title }));
    const chart = new uPlot({ width, height: 240, series: lines, bands, scales: { x: { time: false } },
                              axes: [{ ...axis, incrs: whole }, wide], cursor: { drag: { x: true, y: false } } }, data, place);
    chart.root.querySelectorAll('.u-series').forEach((row, i) => {
      if (i > 0 && lines[i].label === '') row.style.display = 'none';
    });
  };
  drawn.push(draw);
  draw();
}
/// Numbers at the ticks of an axis.
const tick = v => (v === 0 ? '0' : Math.abs(v) < 0.001 || Math.abs(v) >= 1e6 ? v.toExponential(0)
  : String(Number(v.toPrecision(4))));
const redraw = () => drawn.forEach(draw => draw());
dark.addEventListener('change', redraw);
let width = innerWidth;
addEventListener('resize', () => {
  if (innerWidth !== width) redraw();
  width = innerWidth;
});
