'use strict';
(() => {
  const data = JSON.parse(document.getElementById('data').textContent);
  const make = (tag, text, style) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (style) element.className = style;
    return element;
  };
  const page = document.getElementById('page');
  page.replaceChildren();
  page.append(make('h1', data.title));
  if (data.note) page.append(make('p', data.note, 'soft'));
  const byPrompt = data.prompts.map(() => Object.create(null));
  data.answers.forEach(answer => {
    const at = byPrompt[answer.prompt];
    (at[answer.policy] = at[answer.policy] || []).push(answer);
  });
  const mean = (prompt, policy, name) => {
    const found = (byPrompt[prompt][policy] || []).map(a => a.numbers[name]).filter(x => x !== undefined && x !== null);
    return found.length ? found.reduce((a, b) => a + b, 0) / found.length : NaN;
  };
  const round = x => x === null || x === undefined ? '' : Number.isInteger(x) ? String(x) : x.toFixed(3);

  // What is asked for.
  const bar = make('div', undefined, 'bar');
  const label = (text, control) => {
    const found = make('label', text + ' ');
    found.append(control);
    bar.append(found);
    return control;
  };
  const choice = (text, options) => {
    const select = make('select');
    options.forEach(([value, shown]) => {
      const option = make('option', shown);
      option.value = value;
      select.append(option);
    });
    return label(text, select);
  };
  const search = label('with the words', make('input'));
  search.type = 'search';
  search.id = 'search';
  const orders = [['given', 'as given'], ['random', 'at random (always the same)']];
  data.numbers.forEach(name => orders.push(['difference ' + name, 'largest difference in ' + name]));
  if (data.numbers.includes('gold') && data.numbers.includes('proxy')) orders.push(['over', 'proxy furthest above gold']);
  const order = choice('order', orders);
  order.id = 'order';
  const named = data.policies.map(name => [name, name]);
  const one = choice('of', named);
  const two = choice('less', named);
  one.selectedIndex = data.policies.length - 1;
  const colours = [['', 'none']];
  if (data.answers.some(a => a.token_kl)) colours.unshift(['token_kl', 'KL of each token']);
  data.numbers.forEach(name => colours.push([name, name]));
  const colour = choice('colour', colours);
  colour.id = 'colour';
  page.append(bar);
  const shown = make('div', undefined, 'bar');
  const boxes = data.policies.map(name => {
    const box = make('input');
    box.type = 'checkbox';
    box.checked = true;
    const around = make('label', '');
    around.append(box, ' ' + name);
    shown.append(around);
    box.addEventListener('change', () => draw());
    return box;
  });
  const legend = make('span', '', 'soft');
  shown.append(legend);
  page.append(shown);
  const pager = make('div', undefined, 'bar');
  const back = make('button', '\u2190 back');
  const next = make('button', 'next \u2192');
  const place = make('span', '', 'soft');
  place.id = 'place';
  pager.append(back, place, next);
  const list = make('div');
  list.id = 'list';
  page.append(pager, list);

  // Colours: KL by how much of an orange, numbers from blue (low) over nothing to orange (high).
  const all = data.answers.flatMap(a => a.token_kl || []).filter(x => x !== null).sort((a, b) => a - b);
  const most = all.length ? Math.max(all[Math.floor(0.99 * (all.length - 1))], 1e-6) : 1;
  const spans = Object.create(null);
  data.numbers.forEach(name => {
    const found = data.answers.map(a => a.numbers[name]).filter(x => x !== undefined && x !== null);
    spans[name] = found.length ? [Math.min(...found), Math.max(...found)] : [0, 0];
  });
  const tokenColour = kl => `rgba(230, 97, 1, ${(0.85 * Math.min(1, Math.max(0, kl) / most)).toFixed(3)})`;
  const numberColour = (name, value) => {
    const [low, high] = spans[name];
    const at = high > low ? (value - low) / (high - low) * 2 - 1 : 0;
    return at < 0 ? `rgba(33, 102, 172, ${(-0.6 * at).toFixed(3)})` : `rgba(230, 97, 1, ${(0.6 * at).toFixed(3)})`;
  };

  const answerOf = answer => {
    const card = make('div', undefined, 'card answer');
    const said = make('div', undefined, 'said');
    if (colour.value === 'token_kl' && answer.token_kl) {
      answer.tokens.forEach((piece, number) => {
        const kl = answer.token_kl[number];
        const span = make('span', piece);
        if (kl !== null) {
          span.style.backgroundColor = tokenColour(kl);
          span.title = kl.toFixed(3) + ' nats';
        }
        said.append(span);
      });
    } else said.textContent = answer.text;
    card.append(said);
    const numbers = data.numbers.filter(name => answer.numbers[name] !== undefined && answer.numbers[name] !== null);
    card.append(make('div', numbers.map(name => `${name} ${round(answer.numbers[name])}`).join(' · '), 'numbers'));
    const value = answer.numbers[colour.value];
    if (value !== undefined && value !== null) card.style.backgroundColor = numberColour(colour.value, value);
    return card;
  };

  // A fixed order at random: a hash of the prompt's number.
  const hash = number => Math.imul(Math.imul(number + 1, 2654435761) ^ 0x9e3779b9, 2246822519) >>> 0;
  const SIZE = 20;
  let first = 0;
  const draw = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(word => word);
    const policies = data.policies.filter((_, number) => boxes[number].checked);
    let found = data.prompts.map((_, number) => number).filter(number => {
      const text = [data.prompts[number], ...policies.flatMap(p => (byPrompt[number][p] || []).map(a => a.text))].join('\n').toLowerCase();
      return words.every(word => text.includes(word));
    });
    const [kind, ...rest] = order.value.split(' ');
    const name = rest.join(' ');
    const paired = kind === 'difference';
    one.parentElement.hidden = two.parentElement.hidden = !paired;
    const score = number => {
      if (kind === 'random') return hash(number);
      if (paired) return mean(number, one.value, name) - mean(number, two.value, name);
      return Math.max(...policies.map(p => mean(number, p, 'proxy') - mean(number, p, 'gold')).filter(x => !Number.isNaN(x)), -Infinity);
    };
    if (kind !== 'given') {
      const scores = new Map(found.map(number => [number, score(number)]));
      found = found.filter(number => !Number.isNaN(scores.get(number)) && scores.get(number) !== -Infinity);
      found.sort((a, b) => scores.get(b) - scores.get(a));
    }
    first = Math.max(0, Math.min(first, found.length - 1));
    first -= first % SIZE;
    const part = found.slice(first, first + SIZE);
    place.textContent = found.length ? `prompts ${first + 1} to ${first + part.length} of ${found.length}` : 'no prompt';
    back.disabled = first === 0;
    next.disabled = first + SIZE >= found.length;
    legend.replaceChildren();
    if (colour.value === 'token_kl') {
      const strip = make('span', '', 'legend');
      strip.style.background = `linear-gradient(to right, ${tokenColour(0)}, ${tokenColour(most)})`;
      legend.append('KL of a token: 0 ', strip, ` ${most.toFixed(2)} nats`);
    } else if (colour.value) legend.append(`${colour.value}: blue ${round(spans[colour.value][0])} to orange ${round(spans[colour.value][1])}`);
    list.replaceChildren(...part.map(number => {
      const block = make('section');
      block.append(make('div', data.prompts[number], 'prompt said'));
      const row = make('div', undefined, 'row');
      policies.forEach(policy => {
        const column = make('div', undefined, 'column');
        column.append(make('h3', policy));
        (byPrompt[number][policy] || []).forEach(answer => column.append(answerOf(answer)));
        row.append(column);
      });
      block.append(row);
      return block;
    }));
  };
  [order, one, two, colour].forEach(control => control.addEventListener('change', () => { first = 0; draw(); }));
  search.addEventListener('input', () => { first = 0; draw(); });
  back.addEventListener('click', () => { first -= SIZE; draw(); });
  next.addEventListener('click', () => { first += SIZE; draw(); });
  draw();
})();
