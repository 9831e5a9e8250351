package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/longshore-edge/longshore/e2e/rig"
)

const (
	// deliveries is how many messages reach subscribers in one run of a fan-out, whatever their number.
	deliveries = 200_000
	// arrivals is how many messages arrive in one run of a fan-in.
	arrivals = 100_000
	// messageBytes of every payload.
	messageBytes = 1 << 10
)

// contender is a broker that is compared.
type contender struct {
	name, address string
	rate          float64 // of the newest run, messages/s
}

// brokers lets the edge's broker and mosquitto do the same, in turns.
func brokers(ctx context.Context, b *bench) (err error) {
	s, err := b.newSite("broker")
	if err != nil {
		return err
	}
	defer s.close(&err)
	// Its bound of memory is for small boxes with few devices; thousands of connections need more.
	e, err := s.box(ctx, "dock", "memory: {limit: 2GiB, gcPercent: 100}\n")
	if err != nil {
		return err
	}
	mosquitto, address, err := startMosquitto(ctx, s.dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, end(mosquitto)) }()
	ours, theirs := &contender{name: "ours", address: e.Broker}, &contender{name: "mosquitto", address: address}
	for _, n := range b.subscribers {
		if err := b.fanOut(ctx, n, ours, theirs); err != nil {
			return fmt.Errorf("fan-out to %d: %w", n, err)
		}
	}
	for range b.runs {
		for _, c := range []*contender{ours, theirs} {
			if err := c.fanIn(ctx, b.publishers); err != nil {
				return fmt.Errorf("fan-in at %s: %w", c.name, err)
			}
		}
		what := fmt.Sprintf("fan-in of 1 KB from %s publishers at QoS 1", number(float64(b.publishers)))
		b.compare("fan-in", what, ours, theirs)
	}
	return nil
}

func (b *bench) compare(name, what string, ours, theirs *contender) {
	b.record(figure{Name: name, What: what + ", rate over mosquitto's", Unit: "×", Compare: "(mosquitto: 1)"}, ours.rate/theirs.rate)
	b.record(figure{Name: name + "-rate", What: "the same, messages/s of the edge's broker", Unit: "1/s"}, ours.rate)
}

// fanOut has one publisher send at QoS 0 to all subscribers.
func (b *bench) fanOut(ctx context.Context, n int, contenders ...*contender) error {
	const topic = "plant/broadcast"
	subscribers := make([][]*client, len(contenders))
	defer func() {
		for _, s := range subscribers {
			for _, c := range s {
				c.close()
			}
		}
	}()
	for k, c := range contenders {
		for i := range n {
			sub, err := dialMQTT(ctx, c.address, fmt.Sprintf("panel-%d", i))
			if err != nil {
				return err
			}
			subscribers[k] = append(subscribers[k], sub)
			if err := sub.subscribe(topic); err != nil {
				return err
			}
		}
	}
	for range b.runs {
		for k, c := range contenders {
			if err := c.fanOutOnce(ctx, topic, subscribers[k]); err != nil {
				return fmt.Errorf("at %s: %w", c.name, err)
			}
		}
		b.compare(fmt.Sprintf("fan-out-%d", n), fmt.Sprintf("fan-out of 1 KB to %s subscribers at QoS 0", number(float64(n))), contenders[0], contenders[1])
	}
	return nil
}

func (c *contender) fanOutOnce(ctx context.Context, topic string, subscribers []*client) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	pub, err := dialMQTT(ctx, c.address, "controller")
	if err != nil {
		return err
	}
	defer pub.close()
	messages := max(deliveries/len(subscribers), 1)
	g, ctx := errgroup.WithContext(ctx)
	for _, s := range subscribers {
		g.Go(func() error { return s.messages(ctx, messages) })
	}
	payload := make([]byte, messageBytes)
	begin := time.Now()
	for range messages {
		pub.send(topic, payload, 0)
	}
	if err := errors.Join(pub.w.Flush(), g.Wait()); err != nil {
		return err
	}
	c.rate = float64(messages*len(subscribers)) / time.Since(begin).Seconds()
	return nil
}

// fanIn has many publishers send at QoS 1, ten unacknowledged each, to a topic that nobody reads and no stream keeps.
func (c *contender) fanIn(ctx context.Context, publishers int) error {
	const window = 10
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	clients := make([]*client, 0, publishers)
	defer func() {
		for _, p := range clients {
			p.close()
		}
	}()
	for i := range publishers {
		p, err := dialMQTT(ctx, c.address, fmt.Sprintf("press-%d", i))
		if err != nil {
			return err
		}
		clients = append(clients, p)
	}
	messages := max(arrivals/publishers, 1)
	payload := make([]byte, messageBytes)
	g, ctx := errgroup.WithContext(ctx)
	begin := time.Now()
	for i, p := range clients {
		g.Go(func() error {
			return p.publish(ctx, "presses/"+strconv.Itoa(i), messages, window, func(int) []byte { return payload }, nil)
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	c.rate = float64(messages*publishers) / time.Since(begin).Seconds()
	return nil
}

// startMosquitto runs Debian's mosquitto with its default limits, without persistence as is its default.
func startMosquitto(ctx context.Context, dir string) (*rig.Process, string, error) {
	path, err := exec.LookPath("mosquitto")
	if err != nil {
		if path, err = exec.LookPath("/usr/sbin/mosquitto"); err != nil {
			return nil, "", fmt.Errorf("%w: run e2e/install.sh as root", err)
		}
	}
	address, err := rig.FreeAddress()
	if err != nil {
		return nil, "", err
	}
	host, port, _ := strings.Cut(address, ":")
	config := filepath.Join(dir, "mosquitto.conf")
	text := fmt.Sprintf("listener %s %s\nallow_anonymous true\nlog_type error\nlog_type warning\n", port, host)
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		return nil, "", err
	}
	p, err := rig.Start(dir, "mosquitto", nil, path, "-c", config)
	if err != nil {
		return nil, "", err
	}
	err = poll(ctx, 20*time.Millisecond, func() error {
		c, err := dialMQTT(ctx, address, "probe")
		if err == nil {
			c.close()
		}
		return err
	})
	if err != nil {
		return nil, "", errors.Join(err, end(p))
	}
	return p, address, nil
}
