// Draws what `moesaic compare` found.
const groups = data.comparison;

const asText = value => (value === null ? '' : typeof value === 'string' ? value : JSON.stringify(value));
const written = {
  seconds: duration, peak_memory_bytes: bytes, result_bytes: bytes,
  trainable: n => Math.round(n).toLocaleString('en'), tokens: n => Math.round(n).toLocaleString('en'),
  steps: n => String(Math.round(n)), tokens_per_second: n => n.toFixed(0),
};
const valueOf = (name, group) => {
  const f = group.figures[name];
  if (!f) return '';
  const show = written[name] || figure;
  return f.std === null || f.std === 0 ? show(f.mean) : `${show(f.mean)} \u00b1 ${show(f.std)}`;
};
const states = group => Object.entries(group.status).map(([status, n]) => `${n} ${status}`).join(', ');
el('table').append(tableOf(['', 'runs', ...data.keys, ...data.figures.map(f => f.replace(/_bytes$/, '').replace(/^eval\//, ''))],
  groups.map(group => [group.name, states(group), ...data.keys.map(key => asText(group.settings[key])),
    ...data.figures.map(name => make('span', { textContent: valueOf(name, group) }))])));

const titles = { loss: 'Training loss', eval_loss: 'Evaluation loss' };
const curves = ['eval_loss', 'loss', ...data.figures.filter(f => f.startsWith('eval') && f !== 'eval_loss')];
for (const key of curves) {
  plot('plots', titles[key] || key.replace(/^eval\//, ''), groups.filter(group => group.curves[key]).map(group => ({
    label: group.name, ...(group.runs.length > 1 ? group.curves[key] : { points: group.curves[key].points }) })));
}

el('folders').append(tableOf(['', 'seed', 'folder'],
  groups.flatMap(group => group.runs.map((run, i) => [group.name, asText(group.seeds[i]), run]))));
