'use strict';
(() => {
  const { make, chart, table, round } = klrlhf;
  const first = JSON.parse(document.getElementById('data').textContent);
  const token = new URLSearchParams(location.hash.slice(1)).get('token') || '';
  const page = document.getElementById('page');
  const open = new Set();
  const folded = (title, content) => {
    const details = make('details');
    details.open = open.has(title);
    details.addEventListener('toggle', () => details.open ? open.add(title) : open.delete(title));
    details.append(make('summary', title), ...content);
    return details;
  };
  const STATES = { running: 'warn', finished: 'good', stopped: 'bad' };
  const render = (data, trouble) => {
    const parts = [make('h1', `klrlhf ${data.command}`)];
    const state = make('p');
    const badge = make('span', data.status.state, `badge ${STATES[data.status.state]}`);
    badge.id = 'state';
    state.append(badge, ` ${data.name}`);
    parts.push(state);
    const date = seconds => new Date(1000 * seconds).toLocaleString();
    let said = `page of ${date(data.made)}`;
    if (data.last) said += `; last line of the log ${date(data.last)}`;
    if (data.status.by) said += `; ${data.status.by}`;
    if (data.status.state === 'stopped') said += '; nobody is at work in this folder, and it is not finished: start the same command again to go on';
    parts.push(make('p', said, 'soft'));
    if (trouble) parts.push(make('p', trouble, 'bad'));
    if (data.waits) parts.push(make('p', `People have labelled ${data.waits.done} of ${data.waits.pairs} pairs that were asked: klrlhf label --output ${data.waits.folder}`, data.waits.done < data.waits.pairs ? 'warn' : 'soft'));
    parts.push(make('h2', 'Health'));
    if (!data.warnings.length) parts.push(make('p', data.charts.length ? 'No warning.' : 'Nothing is logged yet.', data.charts.length ? 'good' : 'soft'));
    data.warnings.forEach(text => parts.push(make('p', text, 'warn')));
    const charts = make('div', undefined, 'charts');
    if (data.plane) charts.append(chart({ title: 'The plane of KL and reward', xLabel: 'KL(pi || pi0), nats', yLabel: data.plane.reward, series: [{ name: data.plane.reward, ...data.plane, points: true, labels: data.plane.labels.length > 12 ? null : data.plane.labels }] }));
    data.charts.filter(c => c.main).forEach(c => charts.append(chart({ title: c.title, xLabel: data.axis, series: c.series })));
    if (charts.childNodes.length) parts.push(make('h2', 'As it goes'), make('p', 'Bands and bars are two standard errors.', 'soft'), charts);
    const more = data.charts.filter(c => !c.main);
    if (more.length) {
      const others = make('div', undefined, 'charts');
      more.forEach(c => others.append(chart({ title: c.title, xLabel: data.axis, series: c.series })));
      parts.push(folded(`${more.length} more charts`, [others]));
    }
    if (data.results.length) {
      parts.push(make('h2', 'Results'), make('p', 'Intervals are 1.96 standard errors; n counts the independent units behind them.', 'soft'));
      parts.push(table(['metric', 'value', 'standard error', '95 % interval', 'n'], data.results.map(r => [r.name, round(r.value), round(r.stderr), r.low === undefined ? '' : `[${round(r.low)}, ${round(r.high)}]`, r.n === null ? '' : String(r.n)])));
    }
    if (data.rounds.length) {
      parts.push(make('h2', 'Rounds'));
      const phases = ['sample', 'score', 'pair', 'label', 'believe', 'fit'];
      parts.push(make('p', 'Seconds of each phase; empty: not done, or not part of the round.', 'soft'));
      parts.push(table(['round', ...phases], data.rounds.map(r => [r.number === 0 ? 'offline' : String(r.number), ...phases.map(p => r.seconds[p] === undefined ? '' : r.seconds[p].toFixed(1))])));
      data.rounds.filter(r => r.pairs && r.pairs.length).forEach(r => {
        const content = [];
        r.pairs.forEach(p => {
          content.push(make('div', p.prompt, 'asked said'));
          const both = make('div', undefined, 'pair');
          p.texts.forEach((text, k) => {
            const better = p.label !== null && (k === 0 ? p.label : 1 - p.label);
            const card = make('div', undefined, 'card' + (better !== false && better > 0.5 ? ' better' : ''));
            card.append(make('div', text, 'said'));
            if (better !== false) card.append(make('div', better === 1 ? 'preferred' : better === 0 ? 'not preferred' : `preferred with ${round(better)}`, 'soft'));
            both.append(card);
          });
          content.push(both);
        });
        parts.push(folded(`What round ${r.number} compared: the first ${r.pairs.length} pairs`, content));
      });
    }
    const settings = make('table');
    Object.entries(data.config).forEach(([name, value]) => {
      const row = make('tr');
      row.append(make('td', name), make('td', value, 'wrap'));
      settings.append(row);
    });
    const around = make('div', undefined, 'scroll');
    around.append(settings);
    const rest = [around];
    if (data.device) rest.push(make('p', `${data.device.count} \u00d7 ${data.device.kind} (${data.device.platform}), ${data.device.cpu_cores} CPU cores`, 'soft'));
    if (data.versions) rest.push(make('p', Object.entries(data.versions).map(x => x.join(' ')).join(', '), 'soft'));
    parts.push(folded('Configuration', rest));
    page.replaceChildren(...parts);
  };
  render(first);
  if (first.live) {
    let last = first;
    const again = async () => {
      try {
        const headers = { 'Content-Type': 'application/json' };
        if (token) headers.Authorization = `Bearer ${token}`;
        const reply = await fetch('api/report', { method: 'POST', headers, body: '{}', cache: 'no-store' });
        const found = await reply.json();
        if (!reply.ok) throw new Error(found.error);
        last = found;
        render(found);
      } catch (error) {
        render(last, `not asked anew: ${error.message}`);
      }
      if (last.status.state === 'running' || last.status.state === 'stopped') setTimeout(again, 1000 * first.live);
    };
    setTimeout(again, 0);
  }
})();
