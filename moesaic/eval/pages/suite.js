// Draws what a suite of tasks scored.
const percent = value => (100 * value).toFixed(2);
const cells = (tag, kind, values) => values.map(value => make(tag, { className: kind, textContent: value }));
const table = (head, rows) =>
  make('table', {}, make('tr', {}, ...cells('th', '', head)),
    ...rows.map(([name, ...values]) => make('tr', {}, ...cells('th', 'row', [name]), ...cells('td', 'number', values))));

el('title').textContent = `${data.suite}: ${percent(data.mean)}`;
el('facts').append(`${data.metric} in percent`);
for (const [name, value] of Object.entries(data.facts || {})) {
  el('facts').append(', ', `${name} `, make('b', { textContent: value }));
}
el('row').append(table(['', ...data.columns.map(column => column.name), 'mean'],
  [['median', ...data.columns.map(column => percent(column.median)), percent(data.mean)]]));
const figures = ['median', 'mean', 'min', 'max'];
el('spread').append(table(['', ...figures, 'scores'],
  data.columns.map(column => [column.name, ...figures.map(figure => percent(column[figure])), column.scores.length])));

/// A bar from 0 to the value, with the template's name beside it.
for (const column of data.columns) {
  el('templates').append(make('h3', { textContent: column.name }));
  const sorted = [...column.scores].sort((a, b) => b.value - a.value);
  el('templates').append(make('table', {}, ...sorted.map(score => {
    const bar = make('div');
    bar.style.cssText = `width: ${200 * score.value}px; height: 10px; border-radius: 2px; background: var(--accent)`;
    const track = make('td', {}, bar);
    track.style.cssText = 'width: 200px; background: var(--unseen)';
    const name = [column.tasks.length > 1 || !score.template ? score.task : '', score.template].filter(Boolean).join(': ');
    return make('tr', {}, track, ...cells('td', 'number', [percent(score.value), `${score.questions} questions`]),
      make('td', { className: 'words', textContent: name }));
  })));
}
