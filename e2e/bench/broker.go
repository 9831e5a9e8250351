package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
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
	// Its bounds are for small boxes with few devices.
	connections := max(slices.Max(b.subscribers), b.publishers) + 100
	e, err := s.box(ctx, "dock", "memory: {limit: 2GiB, gcPercent: 100}\n", fmt.Sprintf("LONGSHORE_BROKER_MAX_CONNECTIONS=%d", connections))
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

// fanOut has one publisher send at QoS 0 to all subscribers, which are there for both contenders all the time.
func (b *bench) fanOut(ctx context.Context, n int, ours, theirs *contender) (err error) {
	contenders := []*contender{ours, theirs}
	crowds := make([]*crowd, len(contenders))
	for k, c := range contenders {
		if crowds[k], err = startCrowd(ctx, c.address, n); err != nil {
			return fmt.Errorf("at %s: %w", c.name, err)
		}
		defer func() { err = errors.Join(err, crowds[k].end()) }()
	}
	for range b.runs {
		for k, c := range contenders {
			if c.rate, err = crowds[k].publish(max(deliveries/n, 1)); err != nil {
				return fmt.Errorf("at %s: %w", c.name, err)
			}
		}
		b.compare(fmt.Sprintf("fan-out-%d", n), fmt.Sprintf("fan-out of 1 KB to %s subscribers at QoS 0", number(float64(n))), ours, theirs)
	}
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

// startMosquitto runs Debian's mosquitto with its default limits but that of open files, without persistence as is its default.
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
	if err := raiseFiles(p.PID()); err != nil {
		return nil, "", errors.Join(err, end(p))
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
