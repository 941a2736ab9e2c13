'use strict';
(() => {
  const { make, chart, table, round } = klrlhf;
  const at = id => document.getElementById(id);
  // The token stands behind the #, which no browser sends to anybody.
  const token = new URLSearchParams(location.hash.slice(1)).get('token') || '';
  const ask = async (path, content) => {
    const headers = { 'Content-Type': 'application/json' };
    if (token) headers.Authorization = `Bearer ${token}`;
    let reply;
    try {
      reply = await fetch(path, { method: 'POST', headers, body: JSON.stringify(content), cache: 'no-store' });
    } catch {
      throw new Error('the server does not answer; what was confirmed is kept. Start it again and reload this page.');
    }
    const found = await reply.json().catch(() => ({ error: `status ${reply.status}` }));
    if (!reply.ok) {
      const error = new Error(found.error || `status ${reply.status}`);
      error.status = reply.status;
      throw error;
    }
    return found;
  };
  let annotator = '', current = null, busy = false, since = 0, later = 0;
  const say = (text, style) => { at('message').textContent = text; at('message').className = style || ''; };
  const remember = {
    get: () => { try { return localStorage.getItem('klrlhf-annotator') || ''; } catch { return ''; } },
    set: name => { try { localStorage.setItem('klrlhf-annotator', name); } catch { /* a frame of another site has none */ } },
  };

  const next = async () => {
    clearTimeout(later);
    const found = await ask('api/next', { annotator });
    const { own, left, asked } = found.progress;
    at('progress').textContent = `${own} answers of ${annotator}` + (left === null ? '' : ` \u00b7 ${left} of ${asked} pairs wait for people`);
    current = found.ask ? found : null;
    at('asking').hidden = !current;
    if (current) {
      at('asked').textContent = found.prompt.trim();
      at('left').textContent = found.left;
      at('right').textContent = found.right;
      at('left').classList.remove('picked');
      at('right').classList.remove('picked');
      since = performance.now();
    } else {
      say(asked === undefined ? 'Every pair has its labels. Thank you!' : 'No pair waits for you now; this page looks again by itself.');
      later = setTimeout(() => next().catch(failed), 3000);
    }
  };
  const failed = error => say(error.message, 'bad');

  const answer = async said => {
    if (!current || busy) return;
    busy = true;
    const given = current, seconds = Math.round(performance.now() - since) / 1000;
    document.querySelectorAll('#buttons button').forEach(button => { button.disabled = true; });
    if (said === 'left' || said === 'right') at(said).classList.add('picked');
    try {
      await ask('api/answer', { annotator, ask: given.ask, answer: said, seconds });
      say('');
      await next();
    } catch (error) {
      failed(error);
      // Refused for good: go on. Not kept, or no server: the same pair stays, to be answered again.
      if (error.status === 409) await next().catch(failed);
      else { at('left').classList.remove('picked'); at('right').classList.remove('picked'); }
    } finally {
      busy = false;
      document.querySelectorAll('#buttons button').forEach(button => { button.disabled = false; });
    }
  };
  document.querySelectorAll('#buttons button').forEach(button => button.addEventListener('click', () => answer(button.dataset.answer)));
  const KEYS = { ArrowLeft: 'left', 1: 'left', ArrowRight: 'right', 2: 'right', ArrowDown: 'tie', 0: 'tie', s: 'skip' };
  document.addEventListener('keydown', event => {
    const typing = event.target instanceof HTMLInputElement;
    if (typing || event.repeat || event.ctrlKey || event.altKey || event.metaKey || at('label').hidden || !KEYS[event.key]) return;
    event.preventDefault();
    answer(KEYS[event.key]);
  });
  at('who').addEventListener('submit', event => {
    event.preventDefault();
    annotator = at('name').value.trim();
    if (!annotator) { say('Give a name, so that your labels can be told from others\u2019.', 'bad'); return; }
    remember.set(annotator);
    at('name').blur();
    say('');
    next().catch(failed);
  });
  at('name').value = remember.get();

  const share = found => found === null ? 'not known yet' : `${(100 * found.share).toFixed(0)} % [${(100 * found.low).toFixed(0)}, ${(100 * found.high).toFixed(0)}] of ${found.count}`;
  const taught = async () => {
    const place = at('taught');
    let found;
    try { found = await ask('api/taught', {}); } catch (error) { place.replaceChildren(make('p', error.message, 'bad')); return; }
    const parts = [];
    parts.push(make('p', `${found.labels} labels. Intervals are at 95 %.`, 'soft'));
    parts.push(table(['annotator', 'decided', 'ties', 'skipped'], Object.entries(found.annotators).map(([name, c]) => [name, c.decided || 0, c.tie || 0, c.skip || 0])));
    parts.push(table(['agreement', ''], [
      ['with oneself, on pairs shown again with the sides exchanged', share(found.itself)],
      ['between two annotators of one pair', share(found.others)],
      ['answers for the left side (one half, without a habit)', share(found.left)],
    ]));
    if (found.answers) {
      parts.push(make('h2', 'The set of rewards that the labels allow'));
      const charts = make('div', undefined, 'charts');
      charts.append(chart({ title: 'Information in the labels, nats: log det \u03a3 \u2212 log det \u03bbI', xLabel: 'labelled pairs', series: [{ name: 'information', x: found.curve.count, y: found.curve.information }] }));
      charts.append(chart({ title: 'Radius of the set where least is known: largest \u2016\u03c6 \u2212 mean\u2016', xLabel: 'labelled pairs', series: [{ name: 'width', x: found.curve.count, y: found.curve.width }] }));
      parts.push(charts);
      parts.push(make('h2', 'Reward estimates'));
      const fit = found.agrees === null ? '' : ` The fit has the sign of ${(100 * found.agrees).toFixed(0)} % of the decided labels, which it was made of.`;
      parts.push(make('p', `Of ${found.pool} answers, less the mean at their prompt, \u00b1 1.96 standard errors (Laplace), in nats; ${found.answers.length < found.pool ? 'the highest and the lowest 20.' : 'all.'}${fit}`, 'soft'));
      const most = Math.max(...found.answers.map(a => Math.abs(a.reward) + 1.96 * a.stderr), 1e-9);
      const bars = make('div', undefined, 'bars');
      found.answers.forEach(a => {
        const name = make('div', a.text), axis = make('div', undefined, 'axis'), line = make('span'), dot = make('b');
        name.title = `${a.prompt}\n\n${a.text}`;
        const place = x => `${50 + 50 * x / most}%`;
        line.style.left = place(a.reward - 1.96 * a.stderr);
        line.style.width = `${100 * 1.96 * a.stderr / most}%`;
        dot.style.left = place(a.reward);
        axis.append(line, dot);
        bars.append(name, axis, make('div', `${a.reward.toFixed(2)} \u00b1 ${(1.96 * a.stderr).toFixed(2)}`));
      });
      parts.push(bars);
    }
    place.replaceChildren(...parts);
  };
  const show = name => {
    ['label', 'taught'].forEach(id => {
      at(id).hidden = id !== name;
      at(`tab-${id}`).setAttribute('aria-selected', String(id === name));
    });
    if (name === 'taught') taught();
  };
  at('tab-label').addEventListener('click', () => show('label'));
  at('tab-taught').addEventListener('click', () => show('taught'));
})();
