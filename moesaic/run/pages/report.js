// Draws report.json: one run.
const log = data.log;
const points = key => log.filter(row => typeof row[key] === 'number').map(row => [row.step, row[key]]);
const name = path => path.replace(/\/+$/, '').split('/').pop();

el('title').textContent = `${data.finetuning_type} of ${name(data.model)}`;
document.title = el('title').textContent;
const facts = [['state', data.status], ['steps', `${data.steps} of ${data.max_steps}`],
               ['time', duration(data.seconds)], ['tokens', figure(data.tokens)],
               ['trained parameters', data.trainable.toLocaleString('en')],
               ['of', data.base_parameters.toLocaleString('en')], ['computed in', `${data.dtype} on ${data.device}`]];
if (data.peak_memory_bytes) facts.push(['peak memory', bytes(data.peak_memory_bytes)]);
if (data.result_bytes) facts.push(['size on disk', bytes(data.result_bytes)]);
el('facts').append(...facts.flatMap(([what, value], i) => [i ? ' \u00b7 ' : '', `${what} `, make('b', { textContent: value })]));
el('state').textContent = data.message || '';

// Tasks: the row of step 0, and the last one of the weights that the folder holds.
const scored = log.filter(row => Object.keys(row).some(key => key.startsWith('eval/')));
const keys = [...new Set(scored.flatMap(row => Object.keys(row).filter(key => key.startsWith('eval/'))))];
const before = scored.find(row => row.step === 0);
const weights = row => row.weights_of_step ?? row.step;
const after = [...scored].reverse().find(row => row.step > 0 && (data.weights_of == null || weights(row) === data.weights_of));
el('task_section').hidden = keys.length === 0;
el('tasks').append(tableOf(['task', 'before', `after step ${after ? weights(after) : '\u2013'}`, 'change'],
  keys.map(key => {
    const [a, b] = [before?.[key], after?.[key]];
    const change = a != null && b != null ? `${b >= a ? '+' : '\u2212'}${Math.abs(b - a).toFixed(4)}` : '';
    return [key.slice(5), a ?? '', b ?? '', change];
  })));

const losses = [...new Set(log.flatMap(row => Object.keys(row).filter(key => /^eval_.*loss$/.test(key))))].sort();
plot('plots', 'Loss', [{ label: 'training', points: points('loss') },
                       ...(losses.includes('eval_loss') ? [{ label: 'evaluation', points: points('eval_loss') }] : [])]);
plot('plots', 'Evaluation loss of each data set', losses.filter(key => key !== 'eval_loss')
  .map(key => ({ label: key.replace(/^eval_|_loss$/g, ''), points: points(key) })));
plot('plots', 'Task scores', keys.map(key => ({ label: key.slice(5), points: points(key) })));
plot('plots', 'Learning rate', [{ label: 'learning rate', points: points('learning_rate') }]);
plot('plots', 'Gradient norm', [{ label: 'gradient norm', points: points('grad_norm') }]);
plot('plots', 'Tokens per second', [{ label: 'tokens/s', points: points('tokens_per_second') }]);
plot('plots', 'What the routers add to the loss', [{ label: 'aux loss', points: points('aux_loss') }]);

const routing = data.routing;
el('router_section').hidden = routing.length === 0;
if (routing.length > 0) {
  const of = key => routing.map(row => [row.step, row[key]]);
  plot('router_plots', 'Entropy, mean over routers', [{ label: 'share of the largest', points: of('entropy_share') }]);
  plot('router_plots', 'Load', [{ label: 'largest load of one expert', points: of('max_load') },
                                { label: 'coefficient of variation, mean', points: of('load_cv') }]);
  const last = data.routing_layers;
  const owners = [...new Set(last.map(row => row.owner))];
  const curve = (owner, key) => last.filter(row => row.owner === owner).map(row => [row.layer, row[key]]);
  const named = (owner, what) => (owners.length > 1 ? `${owner}: ${what}` : what);
  plot('router_plots', `By layer, at step ${routing[routing.length - 1].step}`, owners.flatMap(owner => [
    { label: named(owner, 'entropy'), points: curve(owner, 'entropy_share') },
    { label: named(owner, 'largest load'), points: curve(owner, 'max_load') }]), 'layer');
}

el('sample_section').hidden = data.samples.length === 0;
el('sample_note').textContent = data.samples_from === 'evaluation'
  ? 'Held-out rows, answered greedily before the first step and after the last, cut after a few tokens.'
  : 'Rows of the training data, answered greedily before the first step and after the last, cut after a few tokens.';
for (const sample of data.samples) {
  const part = (what, text) => (text == null ? [] : [make('h3', { textContent: what }), make('pre', { textContent: text })]);
  el('samples').append(...part(`${sample.data_set}: asked`, sample.prompt), ...part('reference', sample.reference),
    ...part('before', sample.before), ...part('after', sample.after), make('hr', {}));
}

el('data_sets').append(tableOf(['data set', 'rows', 'rate', 'drawn', 'skipped', 'target tokens'],
  data.data.map(set => [set.name, set.rows, set.rate, set.drawn, set.skipped, set.targets])));
el('command').textContent = data.command || '(called as a library)';
const machine = data.machine;
el('machine').append(tableOf(['', ''], [['processor', machine.cpu], ['cores, threads', `${machine.cores}, ${data.threads}`],
  ['memory', bytes(machine.memory_bytes)], ['system', machine.system],
  ['moesaic, LibTorch', `${data.moesaic}, ${data.libtorch}`], ['begun', data.started], ['written', data.written]]));
el('settings').textContent = JSON.stringify(data.settings, null, 2);
